"""A classification head that YAML names by the path of its class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lightning_bge.errors import ConfigError, first_line
from lightning_bge.models.heads import PACKED_HEADS
from lightning_bge.runtime.class_path import allow_class as allow_class
from lightning_bge.runtime.class_path import check_class_option, find_class, parameters_of
from lightning_bge.runtime.model_config import HEAD
from lightning_bge.runtime.nested_config import as_plain

OPTION = "model.head"
EXPECTED = f"{OPTION}.class_path: expected the path of a class that inherits from torch.nn.Module"
TRIED_ROWS = 3
TRIED_ERRORS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)


@dataclass(frozen=True)
class HeadConfig:
    """What makes the logits of the pooled token vectors.

    Attributes:
        name: auto: the head of the checkpoint, or a new one as transformers' model has it.
        class_path: a torch.nn.Module by its class in its place, such as my_project.TwoLayers. It is called with the
            pooled vectors [N, hidden], in fp32, and returns the logits [N, outputs]. A checkpoint's head is kept where
            it is of the same class and arguments. Such a model is exported in a form that this package alone loads.
        init_args: arguments of the class; `in_features` is the width of the encoder and `out_features` the number of
            outputs, where the class has them and they are not given.
    """

    name: Literal["auto"] = "auto"
    class_path: str | None = None
    init_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_class_option(self, OPTION)
        object.__setattr__(self, "init_args", as_plain(self.init_args))  # as a checkpoint holds them


def head_of(config: PretrainedConfig) -> HeadConfig:
    """The head that a checkpoint was exported with; `auto` where it is one of transformers.

    Raises:
        ValueError: the configuration says something else of it than a class and arguments.
    """
    saved = getattr(config, HEAD, {})
    if not isinstance(saved, dict) or saved.keys() - {"class_path", "init_args"}:
        raise ValueError(f"{HEAD} in its config.json: expected class_path and init_args, got {saved!r}")
    return HeadConfig(**saved)


def use_head(model: PreTrainedModel, head: HeadConfig, seed: int, any_width: bool = False) -> None:
    """Give a model the head that is asked for by its class, or else the checkpoint's, in place; its own one goes.

    Args:
        model: of transformers, with its own head, which it keeps where neither is by a class.
        head: what the user asks for.
        seed: what the weights are drawn from, on the CPU.
        any_width: the number of outputs is not known yet, and any is accepted.

    Raises:
        ConfigError: the architecture's pooled vectors can't be had; a checkpoint alone names the class; or see
            `build_head`.
    """
    given = head.class_path is not None
    head = head if given else head_of(model.config)
    if head.class_path is None:
        return
    config = model.config
    kind = config.model_type
    if kind not in PACKED_HEADS:
        raise ConfigError(
            f"{OPTION}.class_path: expected null, as this model is a {kind}, which pools within its head, got "
            f"{head.class_path}. {', '.join(PACKED_HEADS)} can have another head"
        )
    width = None if any_width else config.num_labels
    model.classifier = build_head(head, config.hidden_size, width, seed, imports=given).to(model.dtype)
    if kind == "bert":
        model.base_model.pooler = None  # an unused parameter would decay, and stop DDP
    elif kind == "modernbert":
        model.head = nn.Identity()
    setattr(config, HEAD, {"class_path": head.class_path, "init_args": dict(head.init_args)})


def build_head(
    head: HeadConfig, in_features: int, out_features: int | None, seed: int, imports: bool = True
) -> nn.Module:
    """A new head of the class on the CPU, in train mode, tried on made-up rows.

    Args:
        head: with a `class_path`.
        in_features: width of the pooled vectors.
        out_features: number of outputs; None: it is not known, and any is accepted.
        seed: what its weights are drawn from; the random number generator of torch is left as it was.
        imports: see `find_class`.

    Raises:
        ConfigError: there is no such class, it does not accept the arguments, or it can't serve: see `_try_head`.
    """
    path = str(head.class_path)
    kind = find_class(path, nn.Module, EXPECTED, imports=imports)
    widths = {"in_features": in_features, "out_features": out_features or 1}
    known = parameters_of(kind)
    given = {name: value for name, value in widths.items() if name in known} | head.init_args
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        try:
            made: nn.Module = kind(**given)
        except (TypeError, ValueError, ImportError) as error:
            raise ConfigError(
                f"{OPTION}.init_args: {path} does not accept {dict(given)}: {first_line(error)}"
            ) from error
        _try_head(made, path, in_features, out_features)
        torch.manual_seed(seed + 1)
        _try_state(made, kind(**given), path, in_features)
    for module in made.modules():
        module.stays_eager = True  # type: ignore[assignment] # a list of modules in it is not the encoder's
    return made.train()


def _try_head(head: nn.Module, path: str, in_features: int, out_features: int | None) -> None:
    """Compute logits and gradients of made-up rows.

    Raises:
        ConfigError: it can't be computed, or gives something else than finite logits for each row; a row's logits
            depend on the other rows; buffers change in training, which no other trial and no micro-batch may notice;
            or a parameter has no gradient.
    """
    rows = torch.randn(TRIED_ROWS, in_features, requires_grad=True)
    buffers = [buffer.clone() for buffer in head.buffers()]
    try:
        trained = head.train()(rows)
        changed = any(not torch.equal(*pair) for pair in zip(buffers, head.buffers(), strict=True))
        of_first = torch.autograd.grad(trained[0].sum(), rows, retain_graph=True)[0]
        trained.sum().backward()
        head.eval()
        with torch.no_grad():
            logits = head(rows)
            alone = torch.cat([head(row[None]) for row in rows])
    except TRIED_ERRORS as error:
        what = f"vectors [{TRIED_ROWS}, {in_features}]"
        raise ConfigError(f"{OPTION}.class_path: {path} can't be computed of {what}: {first_line(error)}") from error
    width = out_features or logits.shape[-1]
    if logits.shape != (TRIED_ROWS, width) or not logits.isfinite().all():
        got = f"shape {list(logits.shape)}" if logits.isfinite().all() else "others"
        raise ConfigError(
            f"{OPTION}.class_path: expected finite logits of shape [{TRIED_ROWS}, {width}] of {path}, got {got}. A "
            "class with an argument out_features gets the number of outputs there"
        )
    if changed:
        raise ConfigError(
            f"{OPTION}.class_path: {path} keeps statistics of batches in buffers, as BatchNorm does, which depend on "
            "how an effective batch is cut into micro-batches. Use LayerNorm or none"
        )
    if of_first[1:].any() or not torch.allclose(logits, alone, rtol=1e-4, atol=1e-6):
        raise ConfigError(
            f"{OPTION}.class_path: {path} gives a row other logits when other rows are there: they would depend on its "
            "neighbors, and on how an effective batch is cut. Let each row's logits depend on it alone"
        )
    without = [
        name for name, parameter in head.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    if without:
        raise ConfigError(f"{OPTION}.class_path: no logit of {path} depends on its parameters {', '.join(without)}")
    head.zero_grad(set_to_none=True)


def _try_state(head: nn.Module, other: nn.Module, path: str, in_features: int) -> None:
    """Load the state of a head into another one.

    Raises:
        ConfigError: they give other logits then: something that is drawn at random is in no checkpoint.
    """
    rows = torch.randn(TRIED_ROWS, in_features)
    other.load_state_dict(head.state_dict())
    with torch.no_grad():
        same = torch.allclose(head.eval()(rows), other.eval()(rows), rtol=1e-4, atol=1e-6)
    if not same:
        raise ConfigError(
            f"{OPTION}.class_path: {path} has random values that its state_dict does not hold, so that a loaded model "
            "would give other scores. Make them parameters, or buffers with persistent=True"
        )
