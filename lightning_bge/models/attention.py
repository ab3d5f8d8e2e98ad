"""Attention over packed sequences: no token of one sequence sees a token of another, and nothing is padded.

Registered with transformers' attention interface under the name `packed`, so that the models' own code stays
untouched: a model set to it by `set_attn_implementation("packed")` is called with `input_ids` and `position_ids` of
shape [1, T] and the extra keyword `lengths`, which transformers hands through to the attention function.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

PACKED = "packed"


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
    lengths: tuple[int, ...],
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention within each sequence.

    Neighbouring sequences of one length share a call: as micro-batches are sorted by length, few calls are made.
    `split` rather than slices: its backward is one concatenation, where each slice would fill a whole gradient.

    Args:
        module: the attention layer; unused, as the interface asks for it.
        query: [1, heads, T, head_dim]; `key` and `value` likewise.
        attention_mask: ignored; `lengths` says which tokens belong together.
        lengths: the sequences' lengths in tokens, in order; they sum to T.
        dropout: probability with which an attention weight is dropped.
        scaling: factor on the scores; None means 1 / sqrt(head_dim).
        sliding_window: a token sees those less than so many positions away (ModernBERT's local layers); None: all.

    Returns:
        [1, T, heads, head_dim], and None in place of the attention weights.
    """
    runs = [(length, len(list(same))) for length, same in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    heads, dim = query.shape[1], query.shape[3]
    parts = [tensor[0].transpose(0, 1).split(sizes) for tensor in (query, key, value)]
    outputs = []
    for (length, count), *qkv in zip(runs, *parts, strict=True):
        q, k, v = (part.view(count, length, heads, dim).transpose(1, 2) for part in qkv)
        mask = _window_mask(length, sliding_window, q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
        outputs.append(out.transpose(1, 2).reshape(count * length, heads, dim))
    return torch.cat(outputs).unsqueeze(0), None


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    return (position[:, None] - position[None, :]).abs() < window


def _no_mask(*_: Any, **__: Any) -> None:
    """transformers asks for a mask before the first layer; packed attention needs none."""
