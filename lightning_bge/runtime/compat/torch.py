"""What this package needs of torch that has no public name: one function each, with its reason."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree

tree_leaves: Callable[[Any], list[Any]] = _pytree.tree_leaves
"""The leaves of nested lists, tuples and dicts; torch has no public module for this."""
tree_map: Callable[[Callable[[Any], Any], Any], Any] = _pytree.tree_map
"""Nested lists, tuples and dicts of the same structure with each leaf replaced."""


# ---------------------------------------------------------------------- torch.compile


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """What `module.compile()` has put in the place of the module's call; None where the module is eager.

    torch has no public way to ask for it.
    """
    return module._compiled_call_impl


def set_compiled_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Use a compiled call that `compiled_call` has returned, or None to make the module eager.

    `Module.compile` cannot be undone by a public function.
    """
    module._compiled_call_impl = call


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile(module)` has wrapped, or the module itself; nothing public unwraps it."""
    return getattr(module, "_orig_mod", module)


def dynamo_counts() -> tuple[int, int, int]:
    """Functions that this process gave to torch.compile, those compiled, and graphs.

    torch keeps these counters in a private module only. It is not imported for this, as that takes seconds: before
    anything has been compiled, all three are 0.
    """
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return 0, 0, 0
    frames = dynamo.counters["frames"]
    return frames["total"], frames["ok"], dynamo.counters["stats"]["unique_graphs"]


def stop_compile_workers() -> None:
    """End inductor's worker processes, which hold memory and may still work on what was interrupted.

    Inductor starts them when it needs them. No public function ends them.
    """
    if (workers := sys.modules.get("torch._inductor.async_compile")) is not None:
        workers.shutdown_compile_workers()


def has_triton() -> bool:
    """Whether inductor can compile for the GPU; the import of triton is slow, and no public function asks."""
    from torch.utils import _triton

    return _triton.has_triton()


# ---------------------------------------------------------------------- optimizers


def stop_stepping(optimizer: Optimizer) -> None:
    """Let `optimizer.step` go through its closure, forward and backward, and change nothing.

    Trial steps must leave the weights as they are. A learning-rate scheduler warns unless the optimizer carries its
    two marks of a step. To undo it, restore the optimizer's `vars`.
    """
    optimizer.step = _no_step  # type: ignore[method-assign]
    optimizer._opt_called = True  # type: ignore[attr-defined]


@torch.enable_grad()
def _no_step(closure: Callable[[], Any] | None = None, **_: Any) -> Any:
    return None if closure is None else closure()


_no_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor was changed in place, but for fused kernels; autograd counts it, with no public name."""
    return [tensor._version for tensor in tensors]


def forget_interrupted_step(scaler: torch.amp.GradScaler) -> None:
    """Clear what a gradient scaler holds of a step that was interrupted: it would refuse the next one."""
    scaler._per_optimizer_states.clear()


def takes_found_inf(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler tells an optimizer in its attribute `found_inf` that a step is to be skipped.

    Lightning unscales the gradients of any other optimizer itself, a second time where a module has done it to clip
    them.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def with_found_inf(kind: type[Any]) -> type[Any]:
    """A class of optimizers that leave out a step when a gradient scaler says so: see `takes_found_inf`."""

    class Skipping(kind):
        _step_supports_amp_scaling = True

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            if (found := getattr(self, "found_inf", None)) is not None and found.item():
                return None
            return super().step(closure)

    Skipping.__name__ = Skipping.__qualname__ = kind.__name__
    return Skipping


# ---------------------------------------------------------------------- memory and hardware


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA GPU; (0, 0) of any other device: a GPU of ROCm is `cuda` too, with a number of another meaning."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.hip is None else (0, 0)


def clear_cublas_workspaces() -> None:
    """Free the 8 to 32 MiB that cuBLAS holds for each handle and allocates when it needs them."""
    torch._C._cuda_clearCublasWorkspaces()


def cpu_bf16_units() -> list[str]:
    """Names of the CPU's units that multiply bf16 matrices: `amx_bf16`, `avx512_bf16`.

    `torch.cpu.get_capabilities` is not in every supported version; the older functions are private.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        able = torch.cpu.get_capabilities()
        return [name for name in ("amx_bf16", "avx512_bf16") if able.get(name)]
    # every CPU with AMX's tiles multiplies bf16 in them
    probes = {"amx_bf16": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
    return [name for name, probe in probes.items() if hasattr(torch.cpu, probe) and getattr(torch.cpu, probe)()]


# ---------------------------------------------------------------------- torch.distributed


def compare_and_set(key: str, expected: str, desired: str) -> str:
    """Write a note into the default process group's store unless one is there; returns what is there then.

    No public function returns the store.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store().compare_set(key, expected, desired).decode()


# ---------------------------------------------------------------------- tensors and kernels

softmax_backward: Callable[[Tensor, Tensor, int, torch.dtype], Tensor] = torch._softmax_backward_data
"""Gradient of the weights, the weights, dimension, dtype -> gradient of the scores. The public softmax has it in its
graph alone, which attention with a backward pass of its own does not record."""


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source into its target, on a GPU in few kernels; the public call would be one kernel a tensor."""
    torch._foreach_copy_(targets, sources)


def _operator(name: str) -> Any:
    packet = getattr(torch.ops.aten, name, None)
    return packet.default if packet is not None and "default" in packet.overloads() else None


flash_attention_forward = _operator("_flash_attention_forward")
"""The flash kernel over packed sequences, with dropout; None where this torch has none. The public
`torch.nn.attention.varlen.varlen_attn` calls it without dropout. Call it only if `has_flash_attention()`."""
flash_attention_backward = _operator("_flash_attention_backward")
"""Its derivative."""

FORWARD_ARGUMENTS = (
    *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
    *("dropout_p", "is_causal", "return_debug_mask"),
)
BACKWARD_ARGUMENTS = (
    *("grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
    *("dropout_p", "is_causal", "rng_state", "unused"),
)
FLASH_OPTIONS = ("scale", "window_size_left", "window_size_right")


def has_flash_attention() -> bool:
    """Whether both flash operators have the arguments that they are called with."""
    return _has_signature(flash_attention_forward, FORWARD_ARGUMENTS, returns=5) and _has_signature(
        flash_attention_backward, BACKWARD_ARGUMENTS, returns=3
    )


def _has_signature(operator: Any, positional: tuple[str, ...], returns: int) -> bool:
    """Whether an operator takes these arguments, in this order, and needs no others but `FLASH_OPTIONS`."""
    if operator is None:
        return False
    schema = operator._schema
    first, others = schema.arguments[: len(positional)], schema.arguments[len(positional) :]
    return (
        tuple(argument.name for argument in first) == positional
        and {argument.name for argument in others} >= set(FLASH_OPTIONS)
        and all(argument.has_default_value() for argument in others)
        and len(schema.returns) == returns
    )
