"""Attention over packed sequences: no token of one sequence sees a token of another, and nothing is padded.

Registered with transformers' attention interface under the name `packed`, so that the models' own code stays
untouched: a model set to it by `set_attn_implementation("packed")` is called with `input_ids` and `position_ids` of
shape [1, T] and the extra keyword `packing`, which transformers hands through to the attention function.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from lightning_bge.models.attention.cpu import CpuAttention
from lightning_bge.models.attention.cuda import (
    Capabilities,
    by_runs,
    capabilities,
    flash,
    flash_at_rate,
    nested,
    no_flash,
    no_nested,
    varlen,
)
from lightning_bge.models.attention.packing import Packing
from lightning_bge.models.dropout import CheapDropout, rate_of

log = logging.getLogger(__name__)

PACKED = "packed"

# q, k, v [T, heads, head_dim], packing, dropout, scale, window -> [T, heads, head_dim]
Kernel = Callable[[Tensor, Tensor, Tensor, Packing, float, float, "int | None"], Tensor]


@dataclass(frozen=True)
class Backend:
    """What computes the attention of one kind of call.

    Attributes:
        name: cpu, flash, varlen, nested or sdpa.
        reason: why this one.
        call: the kernel; see `attention.cuda` for its signature.
        fallback: a faster one exists for this device, but not for such calls.
    """

    name: str
    reason: str
    call: Kernel
    fallback: bool = False


@dataclass(frozen=True)
class Kind:
    """What a back end is chosen for: device, dtype, whether there is dropout or a window, and the heads' width."""

    device: torch.device
    dtype: torch.dtype
    dropout: bool
    windowed: bool
    head_dim: int


_in_use: dict[Kind, Backend] = {}


def register_packed_attention() -> None:
    """Make the name `packed` known to transformers; repeating it changes nothing."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _no_mask)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention within each sequence.

    In a compiled layer the flash kernel is part of the graph; every other back end runs outside of it, as it would
    make a graph for each length. A layer's dropout rate may change without another graph where its dropout module is
    a `CheapDropout`; where transformers passes a number (ModernBERT), each number has its own.

    Args:
        module: the attention layer; its dropout module, where it has one, has the rate.
        query: [1, heads, T, head_dim], or [1, heads, N, head_dim]: the first token of each of N sequences.
        key: [1, heads, T, head_dim]; `value` has the same shape.
        attention_mask: ignored; `packing` says which tokens belong together.
        packing: where each sequence begins and ends.
        dropout: probability with which an attention weight is dropped, for a layer without a dropout module.
        scaling: factor on the scores; None means 1 / sqrt(head_dim).
        sliding_window: a token sees those less than so many positions away (ModernBERT's local layers); None: all.

    Returns:
        [1, T or N, heads, head_dim], and None in place of the attention weights.

    Raises:
        ValueError: the lengths do not fit the shapes, or a window was given together with first tokens alone.
    """
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if sliding_window is not None and len(q) != len(k):
        raise ValueError("sliding_window: expected None for the first tokens alone")
    if torch.compiler.is_compiling() and _fits_into_graphs(q.device, q.dtype, q.shape[-1]):
        layer = getattr(module, "dropout", None)
        if isinstance(layer, CheapDropout) and module.training:
            out = flash_at_rate(q, k, v, packing, layer.host_rate, scale, sliding_window)
        else:
            rate = 0.0 if isinstance(layer, CheapDropout) else dropout
            out = flash(q, k, v, packing, rate, scale, sliding_window)
        return out.unsqueeze(0), None
    return _outside_graphs(module, q, k, v, packing, dropout, scale, sliding_window).unsqueeze(0), None


@torch.compiler.disable
def _outside_graphs(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    dropout: float,
    scale: float,
    window: int | None,
) -> Tensor:
    """[T, heads, head_dim] each -> the same shape; a compiled layer breaks here."""
    if packing.tokens != len(k):
        raise ValueError(f"lengths: expected a sum of {len(k)} tokens, got {packing.tokens}")
    if len(q) not in (len(k), len(packing.lengths)):
        raise ValueError(f"query: expected {len(k)} tokens, or {len(packing.lengths)} first ones, got {len(q)}")
    if window is not None and window >= packing.longest:
        window = None
    rate = rate_of(module, dropout)
    backend = _backend_for(Kind(q.device, q.dtype, rate > 0, window is not None, q.shape[-1]))
    return backend.call(q, k, v, packing, rate, scale, window)


@torch.compiler.assume_constant_result
def _fits_into_graphs(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether such calls go to the flash operator, which the compiler knows; evaluated once, while a graph is made."""
    return _backend_for(Kind(device, dtype, dropout=True, windowed=False, head_dim=head_dim)).name == "flash"


def _backend_for(kind: Kind) -> Backend:
    """The back end of such calls; chosen, and logged with its reason, at the first one."""
    backend = _in_use.get(kind)
    if backend is None:
        backend = _in_use[kind] = choose_backend(kind, capabilities(kind.device))
        choice = logging.DEBUG if kind.device.type == "cpu" else logging.INFO  # on a CPU there is only one
        log.log(
            logging.WARNING if backend.fallback else choice,
            "packed attention on %s in %s%s%s: %s (%s)",
            kind.device,
            str(kind.dtype).removeprefix("torch."),
            " with dropout" if kind.dropout else "",
            " with a window" if kind.windowed else "",
            backend.name,
            backend.reason,
        )
    return backend


def choose_backend(kind: Kind, able: Capabilities) -> Backend:
    """The fastest back end that computes such calls exactly; it depends on its arguments alone."""
    if kind.device.type == "cpu":
        return Backend("cpu", "written for CPUs", _cpu)
    if kind.device.type != "cuda" or able.compute == (0, 0):
        return Backend("sdpa", f"{kind.device.type}: no kernel over packed sequences is known here", by_runs)
    problem = no_flash(kind.dtype, kind.head_dim, able)
    if problem is None:
        if able.flash:
            return Backend("flash", "one kernel over all sequences", flash)
        problem = "this torch's flash operator has another signature"
        if able.varlen and not kind.dropout:
            return Backend("varlen", problem, varlen, fallback=True)
    more = no_nested(kind.dtype, kind.head_dim, kind.windowed, able)
    if more is None:
        return Backend("nested", problem, nested, fallback=True)
    return Backend("sdpa", f"{problem}; {more}", by_runs, fallback=True)


def backends_in_use() -> list[tuple[Kind, Backend]]:
    """The kinds of calls that this process has made so far, each with what computes them, and why."""
    return list(_in_use.items())


def _cpu(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float, scale: float, window: int | None) -> Tensor:
    return CpuAttention.apply(q, k, v, packing.lengths, dropout, scale, window)


def _no_mask(*_: Any, **__: Any) -> None:
    """transformers asks for a mask before the first layer; packed attention needs none."""
