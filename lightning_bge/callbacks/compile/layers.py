"""The layers of an encoder: which they are, how they are compiled in place, and what their graphs depend on."""

from collections.abc import Hashable, Sequence
from typing import Any

from torch import nn

from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.runtime.compat.torch import compiled_call


def find_layers(module: nn.Module) -> list[nn.Module]:
    """The longest `nn.ModuleList` whose modules are of one class: an encoder's layers. Empty where there is none.

    A layer with a true attribute `stays_eager` is left out.
    """
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    compilable = [[layer for layer in part if not getattr(layer, "stays_eager", False)] for part in lists]
    return max((part for part in compilable if len({type(layer) for layer in part}) == 1), key=len, default=[])


def compile_layers(layers: Sequence[nn.Module], config: CompileConfig) -> None:
    """Compile layers in place, so that no key of the state dict changes; a compiled layer is not compiled twice."""
    for layer in layers:
        if compiled_call(layer) is None:
            layer.compile(dynamic=True, mode=config.mode, backend=config.backend)


def signature(layer: nn.Module) -> Hashable:
    """What a graph depends on: the modules' classes and flags, the parameters' shapes and types."""
    parts = tuple(
        (
            name,
            type(part).__qualname__,
            *((key, value) for key, value in sorted(vars(part).items()) if _is_flag(key, value)),
        )
        for name, part in layer.named_modules()
    )
    return parts, tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())


def _is_flag(name: str, value: Any) -> bool:
    return not name.startswith("_") and name != "training" and (value is None or isinstance(value, bool))
