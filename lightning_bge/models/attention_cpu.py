"""Packed attention on a CPU, forward and backward written out.

torch's CPU kernel has no dropout of its own and falls back to a chain of recorded operations. Here the weights of all
sequences lie in one flat tensor, so that dropout is drawn and applied in a few large operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_bge.models.dropout import keep_bits, keep_scale, masked
from lightning_bge.models.packing import Runs


class _Place(NamedTuple):
    """Where a run lies in the queries, in the keys and values, and in the flat weights."""

    queries: slice
    keys: slice
    weights: slice
    shape: tuple[int, int, int]  # of its weights: [count * heads, queries, length]
    sequences: int


def _places(runs: Runs, heads: int, single: bool) -> Iterator[_Place]:
    q = k = w = 0
    for length, count in runs:
        rows = 1 if single else length
        shape = (count * heads, rows, length)
        ends = q + count * rows, k + count * length, w + count * heads * rows * length
        yield _Place(slice(q, ends[0]), slice(k, ends[1]), slice(w, ends[2]), shape, count)
        q, k, w = ends


class CpuAttention(torch.autograd.Function):
    """Attention, a run of equal lengths at a time."""

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
        """[T, heads, head_dim] each -> the shape of `q`, which may hold one query a sequence instead, its first.

        The factors on the scores and of dropout go to `q` and `v`, which are smaller than the scores.
        """
        q = q * scale
        v = v * keep_scale(dropout) if dropout > 0 else v
        places = list(_places(runs, q.shape[1], single=len(q) != len(k)))
        weights = q.new_empty(places[-1].weights.stop)
        scores = torch.empty_like(weights)
        for at in places:
            raw = scores[at.weights].view(at.shape)
            torch.bmm(
                _by_head(q[at.queries], at.sequences), _by_head(k[at.keys], at.sequences).transpose(1, 2), out=raw
            )
            _hide(raw, window)
            torch._softmax(raw, -1, False, out=weights[at.weights].view(at.shape))
        bits = keep_bits(len(weights), dropout, weights.dtype) if dropout > 0 else None
        used = weights if bits is None else masked(weights, bits, out=scores)
        output = q.new_empty(q.shape)
        for at in places:
            _put(output[at.queries], torch.bmm(used[at.weights].view(at.shape), _by_head(v[at.keys], at.sequences)), at)
        ctx.save_for_backward(q, k, v, weights, bits)
        ctx.places, ctx.scale, ctx.dropout = places, scale, dropout
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The chain rule by hand: d softmax = weights * (d - sum(d * weights))."""
        q, k, v, weights, bits = ctx.saved_tensors
        used = weights if bits is None else masked(weights, bits)
        d_weights = torch.empty_like(weights)
        d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
        for at in ctx.places:
            d_out, c = _by_head(grad[at.queries], at.sequences), _by_head(v[at.keys], at.sequences)
            torch.bmm(d_out, c.transpose(1, 2), out=d_weights[at.weights].view(at.shape))
            _put(d_v[at.keys], torch.bmm(used[at.weights].view(at.shape).transpose(1, 2), d_out), at)
        if bits is not None:
            masked(d_weights, bits, out=d_weights)
            d_v *= keep_scale(ctx.dropout)
        for at in ctx.places:
            d_soft, soft = (x[at.weights].view(at.shape) for x in (d_weights, weights))
            d_scores = torch._softmax_backward_data(d_soft, soft, -1, soft.dtype)
            _put(d_q[at.queries], torch.bmm(d_scores, _by_head(k[at.keys], at.sequences)), at)
            _put(d_k[at.keys], torch.bmm(d_scores.transpose(1, 2), _by_head(q[at.queries], at.sequences)), at)
        return d_q.mul_(ctx.scale), d_k, d_v, None, None, None, None


def _by_head(rows: Tensor, count: int) -> Tensor:
    """[count * n, heads, dim] -> [count * heads, n, dim]; a view where the count is 1."""
    heads, dim = rows.shape[1:]
    return rows.reshape(count, -1, heads, dim).transpose(1, 2).reshape(count * heads, -1, dim)


def _put(rows: Tensor, by_head: Tensor, at: _Place) -> None:
    """The reverse of `_by_head`, into `rows`."""
    heads, dim = rows.shape[1:]
    rows.view(at.sequences, -1, heads, dim).copy_(by_head.view(at.sequences, heads, -1, dim).transpose(1, 2))


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
