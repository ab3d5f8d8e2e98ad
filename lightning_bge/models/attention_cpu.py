"""Packed attention on a CPU, forward and backward written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_bge.models.dropout import keep_mask

Runs = tuple[tuple[int, int], ...]  # (length, count): so many neighbouring sequences of one length


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
    seen = window_mask(a.shape[1], window, a.device)
    return scores if seen is None else scores.masked_fill_(~seen, -torch.inf)


def window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which of `length` tokens see each other, [length, length]; None: all of them."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    return (position[:, None] - position[None, :]).abs() < window
