"""Packed attention on GPUs and other devices: the kernels, and what a device and a torch version offer of them.

Every kernel has one signature: `q`, `k`, `v` [T, heads, head_dim] of one dtype, views without copies; the `Packing`;
the dropout rate; the factor on the scores; the window (a token sees those less than so many positions away; None:
all). It returns the shape of `q`, which may hold one query a sequence instead, its first ([N, heads, head_dim]; then
without a window). None waits for the device: lengths are known on the host.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bge.models.attention.cpu import window_mask
from lightning_bge.models.attention.packing import Packing
from lightning_bge.runtime.compat.torch import (
    compute_capability,
    flash_attention_backward,
    flash_attention_forward,
    has_flash_attention,
)

# What the flash kernels' backward takes on every GPU that has them; the forward goes up to 256.
FLASH_HEAD_DIM = 192


@dataclass(frozen=True)
class Capabilities:
    """What a device and this torch offer.

    Attributes:
        compute: compute capability of an NVIDIA GPU; (0, 0) elsewhere.
        flash: torch's flash operators have the signatures that are called here (they are not public).
        varlen: `torch.nn.attention.varlen.varlen_attn` exists (public, without dropout).
        nested: nested tensors of jagged layout exist.
    """

    compute: tuple[int, int]
    flash: bool
    varlen: bool
    nested: bool


def capabilities(device: torch.device) -> Capabilities:
    """Find out what a device and this torch offer."""
    return Capabilities(
        compute=compute_capability(device),
        flash=has_flash_attention(),
        varlen=find_spec("torch.nn.attention.varlen") is not None,
        nested=hasattr(torch.nested, "nested_tensor_from_jagged"),
    )


def no_flash(dtype: torch.dtype, head_dim: int, able: Capabilities) -> str | None:
    """Why the flash kernels can't take such a call; None: they can."""
    if able.compute < (8, 0):
        return f"flash kernels need compute capability 8.0, this device has {able.compute[0]}.{able.compute[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash kernels take bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > FLASH_HEAD_DIM:
        return f"flash kernels take head dimensions that are multiples of 8 up to {FLASH_HEAD_DIM}, not {head_dim}"
    return None


def no_nested(dtype: torch.dtype, head_dim: int, windowed: bool, able: Capabilities) -> str | None:
    """Why nested tensors would not reach a fused kernel (the unfused one waits for the device); None: they do."""
    if not able.nested:
        return "this torch has no jagged nested tensors"
    if windowed:
        return "nested tensors take no window"
    if dtype is torch.bfloat16 and able.compute < (8, 0):
        return "this device has no bfloat16 kernels"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16) or head_dim % 8 or able.compute < (5, 0):
        return "no fused kernel takes such nested tensors"
    return None


def flash(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float, scale: float, window: int | None
) -> Tensor:
    """torch's flash operator, one call for all sequences, with dropout; it has a derivative of its own.

    `varlen_attn` wraps this very operator in Python, without dropout: its calls cost the host several times as long,
    which counts where a step of a small encoder lasts milliseconds.
    """
    return flash_attention_forward(
        q, k, v, *_places(q, k, packing), dropout, False, False, **_options(scale, _reach(window))
    )[0]


def varlen(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float, scale: float, window: int | None
) -> Tensor:
    """torch's public call of the same kernel, which has no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    assert dropout == 0
    reach = -1 if window is None else window - 1
    out = varlen_attn(q, k, v, *_places(q, k, packing), scale=scale, window_size=(reach, reach))
    assert isinstance(out, Tensor)  # a pair only with `return_aux`
    return out


def nested(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float, scale: float, window: int | None
) -> Tensor:
    """Jagged nested tensors: one call of the kernel that torch chooses for them, in fp32 the memory-efficient one."""
    assert window is None
    starts, offsets, *_ = _places(q, k, packing)
    shortest, longest = min(packing.lengths), packing.longest
    of_queries = (shortest, longest) if starts is offsets else (1, 1)
    # with the extremes passed, they are not read from the device
    a, b, c = (
        torch.nested.nested_tensor_from_jagged(tensor, where, min_seqlen=low, max_seqlen=high).transpose(1, 2)
        for tensor, where, (low, high) in (
            (q, starts, of_queries),
            (k, offsets, (shortest, longest)),
            (v, offsets, (shortest, longest)),
        )
    )
    return F.scaled_dot_product_attention(a, b, c, dropout_p=dropout, scale=scale).transpose(1, 2).values()


def by_runs(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float, scale: float, window: int | None
) -> Tensor:
    """torch's attention once a run of equal lengths; `split`, as the backward of a slice fills a whole gradient."""
    heads, dim = q.shape[1:]
    sizes = [length * count for length, count in packing.runs]
    asked = sizes if len(q) == len(k) else [count for _, count in packing.runs]
    outputs = []
    for (length, count), *parts in zip(packing.runs, q.split(asked), k.split(sizes), v.split(sizes), strict=True):
        a, b, c = (part.reshape(count, -1, heads, dim).transpose(1, 2) for part in parts)
        seen = window_mask(length, window, q.device)
        mask = None if seen is None else seen[: a.shape[2]]
        out = F.scaled_dot_product_attention(a, b, c, attn_mask=mask, dropout_p=dropout, scale=scale)
        outputs.append(out.transpose(1, 2).reshape(-1, heads, dim))
    return torch.cat(outputs)


def _places(q: Tensor, k: Tensor, packing: Packing) -> tuple[Tensor, Tensor, int, int]:
    """Starts of queries and of keys, and bounds of their number a sequence, which only size the launch."""
    if len(q) == len(k):
        return packing.cu_seqlens, packing.cu_seqlens, packing.bound, packing.bound
    starts = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    return starts, packing.cu_seqlens, 1, packing.bound


def _reach(window: int | None) -> int | None:
    """A flash window counts its ends: |i - j| <= reach."""
    return None if window is None else window - 1


def _options(scale: float, reach: int | None) -> dict[str, Any]:
    return {"scale": scale, "window_size_left": reach, "window_size_right": reach}


# Inside a compiled graph a rate that is a Python number would be a constant: another rate, another graph. Here it comes
# as a number on the host that the graph passes on and the operator reads when it runs. A replayed CUDA graph would not
# read it again, so that the operators are kept out of those.
_TAGS = (torch.Tag.cudagraph_unsafe, torch.Tag.nondeterministic_seeded)
_PLACES = "Tensor starts_q, Tensor starts_k, Tensor rate"
_NUMBERS = "SymInt max_q, SymInt max_k, float scale, int? reach"


@torch.library.custom_op(
    "lightning_bge::flash_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_PLACES}, {_NUMBERS}) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
def _flash_at_rate(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, rate: Tensor, *numbers: Any
) -> tuple[Tensor, Tensor, Tensor]:
    max_q, max_k, scale, reach = numbers
    return flash_attention_forward(
        q, k, v, starts_q, starts_k, max_q, max_k, rate.item(), False, False, **_options(scale, reach)
    )[:3]


@_flash_at_rate.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    logsumexp = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return torch.empty_like(q), logsumexp, q.new_empty(2, dtype=torch.uint64)


@torch.library.custom_op(
    "lightning_bge::flash_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, Tensor rng_state, "
    f"{_PLACES}, {_NUMBERS}) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS[:1],
)
def _flash_at_rate_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, rng_state: Tensor, *places: Any
) -> tuple[Tensor, Tensor, Tensor]:
    starts_q, starts_k, rate, max_q, max_k, scale, reach = places
    return flash_attention_backward(
        *(grad, q, k, v, out, logsumexp, starts_q, starts_k, max_q, max_k, rate.item(), False, rng_state),
        q.new_empty(0),
        **_options(scale, reach),
    )


@_flash_at_rate_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, starts_q, starts_k, rate, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, starts_q, starts_k, rate)


def _derive(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = torch.ops.lightning_bge.flash_attention_backward(grad, *ctx.saved_tensors, *ctx.numbers)
    return *grads, *[None] * 7


_flash_at_rate.register_autograd(_derive, setup_context=_save)


def flash_at_rate(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, rate: Tensor, scale: float, window: int | None
) -> Tensor:
    """As `flash`, for compiled graphs: `rate` [] is a number on the host, so that one graph serves all rates."""
    starts_q, starts_k, *most = _places(q, k, packing)
    return torch.ops.lightning_bge.flash_attention(q, k, v, starts_q, starts_k, rate, *most, scale, _reach(window))[0]
