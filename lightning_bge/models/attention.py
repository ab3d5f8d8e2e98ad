"""Attention over packed sequences: no token of one sequence sees a token of another, and nothing is padded.

Registered with transformers' attention interface under the name `packed`, so that the models' own code stays
untouched: a model set to it by `set_attn_implementation("packed")` is called with `input_ids` and `position_ids` of
shape [1, T] and the extra keyword `packing`, which transformers hands through to the attention function.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from lightning_bge.models.attention_cpu import CpuAttention, Runs, window_mask
from lightning_bge.models.dropout import rate_of

PACKED = "packed"


class Packing:
    """Where the sequences of a packed batch lie. A plain object, so that a compiled graph does not depend on it.

    Args:
        lengths: the sequences' lengths in tokens, in order.
        cu_seqlens: int32 [N + 1], where each sequence starts, and T at the end; on the model's device.
    """

    def __init__(self, lengths: tuple[int, ...], cu_seqlens: Tensor) -> None:
        self.lengths, self.cu_seqlens = lengths, cu_seqlens
        self.runs: Runs = tuple((length, len(list(same))) for length, same in groupby(lengths))


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

    Neighbouring sequences of one length share a call: as micro-batches are sorted by length, few calls are made.

    Args:
        module: the attention layer; its dropout module, where it has one, says how much is dropped.
        query: [1, heads, T, head_dim]; `key` and `value` likewise.
        attention_mask: ignored; `packing` says which tokens belong together.
        packing: where the sequences lie.
        dropout: probability with which an attention weight is dropped, for a layer without a dropout module.
        scaling: factor on the scores; None means 1 / sqrt(head_dim).
        sliding_window: a token sees those less than so many positions away (ModernBERT's local layers); None: all.

    Returns:
        [1, T, heads, head_dim], and None in place of the attention weights.

    Raises:
        ValueError: the lengths do not sum to T.
    """
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return _outside_graphs(module, q, k, v, packing, dropout, scaling, sliding_window).unsqueeze(0), None


@torch.compiler.disable
def _outside_graphs(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """[T, heads, head_dim] each -> the same shape; a compiled layer breaks here, as each length is another shape."""
    if sum(packing.lengths) != q.shape[0]:
        raise ValueError(f"lengths: expected a sum of {q.shape[0]} tokens, got {sum(packing.lengths)}")
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = CpuAttention.apply if q.device.type == "cpu" else _sdpa
    return kernel(q, k, v, packing.runs, rate_of(module, dropout), scale, window)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, runs: Runs, dropout: float, scale: float, window: int | None) -> Tensor:
    """torch's kernel once a run, [T, heads, head_dim]; `split`, as the backward of a slice fills a whole gradient."""
    heads, dim = q.shape[1:]
    sizes = [length * count for length, count in runs]
    outputs = []
    for (length, count), *parts in zip(runs, *(tensor.split(sizes) for tensor in (q, k, v)), strict=True):
        a, b, c = (part.view(count, length, heads, dim).transpose(1, 2) for part in parts)
        seen = window_mask(length, window, q.device)
        out = F.scaled_dot_product_attention(a, b, c, attn_mask=seen, dropout_p=dropout, scale=scale)
        outputs.append(out.transpose(1, 2).reshape(count * length, heads, dim))
    return torch.cat(outputs)


def _no_mask(*_: Any, **__: Any) -> None:
    """transformers asks for a mask before the first layer; packed attention needs none."""
