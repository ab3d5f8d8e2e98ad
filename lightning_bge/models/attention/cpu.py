"""Packed attention on a CPU, forward and backward written out.

torch's CPU kernel has no dropout of its own and falls back to a chain of recorded operations. Here the weights of all
sequences are in one flat tensor, so that dropout is drawn and applied in a few large operations, and what is done
sequence by sequence takes as few calls as possible.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_bge.models.dropout import keep_bits, keep_scale, masked
from lightning_bge.runtime.compat.torch import softmax_backward


class CpuAttention(torch.autograd.Function):
    """Attention, sequence by sequence."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: tuple[int, ...],
        dropout: float,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """[T, heads, head_dim] each -> the shape of `q`, which may hold one query a sequence instead, its first.

        The factors on the scores and of dropout go to `q` and `v`, which are smaller than the scores.
        """
        queries = lengths if len(q) == len(k) else (1,) * len(lengths)
        shapes = [(q.shape[1], rows, length) for rows, length in zip(queries, lengths, strict=True)]
        q = q * scale
        v = v * keep_scale(dropout) if dropout > 0 else v
        weights = q.new_empty(sum(heads * rows * length for heads, rows, length in shapes))
        scores = torch.empty_like(weights)
        parts = (_by_head(q, queries), _by_head(k, lengths), _flat(scores, shapes), _flat(weights, shapes))
        for a, b, raw, soft in zip(*parts, strict=True):
            torch.bmm(a, b.transpose(1, 2), out=raw)
            _hide(raw, window)
            torch.softmax(raw, -1, out=soft)
        bits = keep_bits(len(weights), dropout, weights.dtype) if dropout > 0 else None
        used = weights if bits is None else masked(weights, bits, out=scores)
        output = torch.empty_like(q)
        for out, soft, c in zip(_by_head(output, queries), _flat(used, shapes), _by_head(v, lengths), strict=True):
            out.copy_(torch.bmm(soft, c))
        ctx.save_for_backward(q, k, v, weights, bits)
        ctx.queries, ctx.lengths, ctx.shapes, ctx.scale, ctx.dropout = queries, lengths, shapes, scale, dropout
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The chain rule by hand: d softmax = weights * (d - sum(d * weights))."""
        q, k, v, weights, bits = ctx.saved_tensors
        queries, lengths, shapes = ctx.queries, ctx.lengths, ctx.shapes
        used = weights if bits is None else masked(weights, bits)
        d_weights = torch.empty_like(weights)
        d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
        parts = (_by_head(grad, queries), _by_head(v, lengths), _flat(used, shapes), _flat(d_weights, shapes))
        for d_out, c, soft, d_soft, d_c in zip(*parts, _by_head(d_v, lengths), strict=True):
            torch.bmm(d_out, c.transpose(1, 2), out=d_soft)
            d_c.copy_(torch.bmm(soft.transpose(1, 2), d_out))
        if bits is not None:
            masked(d_weights, bits, out=d_weights)
            d_v *= keep_scale(ctx.dropout)
        parts = (_by_head(q, queries), _by_head(k, lengths), _flat(weights, shapes), _flat(d_weights, shapes))
        for a, b, soft, d_soft, d_a, d_b in zip(*parts, _by_head(d_q, queries), _by_head(d_k, lengths), strict=True):
            d_scores = softmax_backward(d_soft, soft, -1, soft.dtype)
            d_a.copy_(torch.bmm(d_scores, b))
            d_b.copy_(torch.bmm(d_scores.transpose(1, 2), a))
        return d_q.mul_(ctx.scale), d_k, d_v, None, None, None, None


def _by_head(tokens: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """[T, heads, dim] -> a view [heads, length, dim] for each sequence."""
    return tokens.transpose(0, 1).split(lengths, dim=1)


def _flat(values: Tensor, shapes: list[tuple[int, int, int]]) -> list[Tensor]:
    """The flat weights as one view [heads, queries, length] for each sequence."""
    parts = values.split([heads * rows * length for heads, rows, length in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _hide(scores: Tensor, window: int | None) -> None:
    """-inf, in place, where a token does not see another."""
    seen = window_mask(scores.shape[2], window, scores.device)
    if seen is not None:
        scores.masked_fill_(~seen[: scores.shape[1]], -torch.inf)


def window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which of `length` tokens see each other, [length, length]; None: all of them."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    return (position[:, None] - position[None, :]).abs() < window
