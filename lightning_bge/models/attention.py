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
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface

from lightning_bge.models.dropout import keep_mask

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

    Raises:
        ValueError: the lengths do not sum to T.
    """
    if sum(lengths) != query.shape[2]:
        raise ValueError(f"lengths: expected a sum of {query.shape[2]} tokens, got {sum(lengths)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    runs = tuple((length, len(list(same))) for length, same in groupby(lengths))
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    kernel = CpuAttention.apply if query.device.type == "cpu" else _sdpa
    return kernel(q, k, v, runs, dropout, scale, sliding_window).unsqueeze(0), None


Runs = tuple[tuple[int, int], ...]  # (length, count): so many neighbouring sequences of one length


def _sdpa(q: Tensor, k: Tensor, v: Tensor, runs: Runs, dropout: float, scale: float, window: int | None) -> Tensor:
    """torch's kernel once a run, [T, heads, head_dim]; `split`, as the backward of a slice fills a whole gradient."""
    heads, dim = q.shape[1:]
    sizes = [length * count for length, count in runs]
    outputs = []
    for (length, count), *parts in zip(runs, *(tensor.split(sizes) for tensor in (q, k, v)), strict=True):
        a, b, c = (part.view(count, length, heads, dim).transpose(1, 2) for part in parts)
        seen = _window(length, window, q.device)
        out = F.scaled_dot_product_attention(a, b, c, attn_mask=seen, dropout_p=dropout, scale=scale)
        outputs.append(out.transpose(1, 2).reshape(count * length, heads, dim))
    return torch.cat(outputs)


class CpuAttention(torch.autograd.Function):
    """Attention a run at a time, forward and backward written out: on a CPU torch's kernel has no dropout of its own
    and falls back to a chain of recorded operations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        runs: Runs,
        dropout: float,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """[T, heads, head_dim] each -> the same shape."""
        output = torch.empty(q.shape, dtype=q.dtype)
        kept: list[Tensor | None] = []
        start = 0
        for length, count in runs:
            rows = slice(start, start + length * count)
            start = rows.stop
            a, b, c = (_by_head(tensor[rows], length, count) for tensor in (q, k, v))
            weights = _scores(a, b, scale, window).softmax(dim=-1)
            mask = keep_mask(weights.shape, dropout, weights.dtype) if dropout > 0 else None
            out = torch.bmm(weights if mask is None else weights * mask, c)
            _put(output[rows], out, length, count)
            kept += [a, b, c, weights, mask]
        ctx.save_for_backward(*kept)
        ctx.runs, ctx.scale = runs, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The chain rule by hand: d softmax = weights * (d - sum(d * weights))."""
        grads = [torch.empty(grad.shape, dtype=grad.dtype) for _ in range(3)]
        start = 0
        for number, (length, count) in enumerate(ctx.runs):
            rows = slice(start, start + length * count)
            start = rows.stop
            a, b, c, weights, mask = ctx.saved_tensors[5 * number : 5 * number + 5]
            d_out = _by_head(grad[rows], length, count)
            d_weights = torch.bmm(d_out, c.transpose(1, 2))
            if mask is not None:
                d_weights.mul_(mask)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            used = weights if mask is None else weights * mask
            _put(grads[0][rows], torch.bmm(d_scores, b), length, count)
            _put(grads[1][rows], torch.bmm(d_scores.transpose(1, 2), a), length, count)
            _put(grads[2][rows], torch.bmm(used.transpose(1, 2), d_out), length, count)
        return *grads, None, None, None, None


def _by_head(rows: Tensor, length: int, count: int) -> Tensor:
    """[count * length, heads, dim] -> contiguous [count * heads, length, dim]."""
    heads, dim = rows.shape[1:]
    return rows.reshape(count, length, heads, dim).transpose(1, 2).reshape(count * heads, length, dim)


def _put(rows: Tensor, by_head: Tensor, length: int, count: int) -> None:
    """The reverse of `_by_head`, into `rows`."""
    heads, dim = rows.shape[1:]
    rows.view(count, length, heads, dim).copy_(by_head.view(count, heads, length, dim).transpose(1, 2))


def _scores(a: Tensor, b: Tensor, scale: float, window: int | None) -> Tensor:
    scores = torch.bmm(a, b.transpose(1, 2)).mul_(scale)
    seen = _window(a.shape[1], window, a.device)
    return scores if seen is None else scores.masked_fill_(~seen, -torch.inf)


def _window(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which of `length` tokens see each other, [length, length]; None: all of them."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    return (position[:, None] - position[None, :]).abs() < window


def _no_mask(*_: Any, **__: Any) -> None:
    """transformers asks for a mask before the first layer; packed attention needs none."""
