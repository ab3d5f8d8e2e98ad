"""torch's fused attention operators for GPUs, in a plain implementation on the CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

Starts = tuple[Tensor, Tensor]  # where each sequence starts among queries and keys


class Plain(NamedTuple):
    """One sequence: its places among queries and keys, softmax, and what dropout multiplies it with."""

    queries: slice
    keys: slice
    weights: Tensor
    kept: Tensor
    sums: Tensor


def plain(q: Tensor, k: Tensor, starts: Starts, rate: float, seed: int, options: dict[str, Any]) -> list[Plain]:
    """Each sequence of packed queries and keys [T, heads, head_dim]; dropout is drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    ends = (options.get(f"window_size_{side}") for side in ("left", "right"))
    left, right = (2**31 if end is None or end < 0 else end for end in ends)
    parts = []
    for number in range(len(starts[0]) - 1):
        rows, columns = (slice(int(s[number]), int(s[number + 1])) for s in starts)
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[columns]) * options["scale"]
        offset = torch.arange(scores.shape[2])[None, :] - torch.arange(scores.shape[1])[:, None]
        scores = scores.masked_fill((offset < -left) | (offset > right), -torch.inf)
        kept = torch.ones_like(scores)
        if rate > 0:
            kept = (torch.rand(kept.shape, generator=generator) >= rate).to(q.dtype) / (1 - rate)
        parts.append(Plain(rows, columns, scores.softmax(-1), kept, scores.logsumexp(-1).float()))
    return parts


def attend(v: Tensor, parts: list[Plain]) -> Tensor:
    """The output [T, heads, head_dim]."""
    return torch.cat([torch.einsum("hqk,khd->qhd", p.weights * p.kept, v[p.keys]) for p in parts])


def derive(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, parts: list[Plain], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values."""
    d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
    for p in parts:
        d_weights = torch.einsum("qhd,khd->hqk", grad[p.queries], v[p.keys]) * p.kept
        d_scores = p.weights * (d_weights - (d_weights * p.weights).sum(-1, keepdim=True)) * scale
        d_q[p.queries] = torch.einsum("hqk,khd->qhd", d_scores, k[p.keys])
        d_k[p.keys] = torch.einsum("hqk,qhd->khd", d_scores, q[p.queries])
        d_v[p.keys] = torch.einsum("hqk,qhd->khd", p.weights * p.kept, grad[p.queries])
    return d_q, d_k, d_v


def _seed(rate: float) -> int:
    return int(torch.randint(2**31, ())) if rate > 0 else 0


def register_flash(calls: list[dict[str, Any]]) -> torch.library.Library:
    """Let torch's flash operators work on the CPU, as long as the library that is returned lives.

    Args:
        calls: gets what they are called with, in order.
    """

    def forward(q, k, v, starts_q, starts_k, max_q, max_k, rate, causal, debug, **options):  # type: ignore[no-untyped-def]
        assert starts_q.dtype == starts_k.dtype == torch.int32
        assert max_q >= starts_q.diff().max()
        assert max_k >= starts_k.diff().max()
        assert not causal
        assert not debug
        calls.append({"max_q": max_q, "max_k": max_k, "rate": rate, **options})
        seed = _seed(rate)
        parts = plain(q, k, (starts_q, starts_k), rate, seed, options)
        sums = torch.cat([p.sums for p in parts], dim=1)
        return attend(v, parts), sums, torch.tensor([seed, 0], dtype=torch.uint64), sums.new_empty(0), q.new_empty(0)

    def backward(grad, q, k, v, out, sums, starts_q, starts_k, max_q, max_k, rate, causal, rng_state, _, **options):  # type: ignore[no-untyped-def]
        parts = plain(q, k, (starts_q, starts_k), rate, int(rng_state[0]), options)
        return derive(grad, q, k, v, parts, options["scale"])

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    return library


def register_memory_efficient(calls: list[dict[str, Any]]) -> torch.library.Library:
    """As `register_flash`: the memory-efficient attention over sequences of several lengths."""

    def forward(q, k, v, bias, starts_q, starts_k, max_q, max_k, rate, mask, compute_log_sumexp=False, **options):  # type: ignore[no-untyped-def]
        assert bias is None
        assert mask == 0
        calls.append({"max_q": max_q, "max_k": max_k, "rate": rate, **options})
        seed = _seed(rate)
        parts = plain(q[0], k[0], (starts_q, starts_k), rate, seed, options)
        sums = torch.cat([p.sums for p in parts], dim=1)[None]
        numbers = torch.tensor(seed), torch.tensor(0)
        return attend(v[0], parts)[None], sums, *numbers, int(max_q), int(max_k)

    def backward(grad, q, k, v, bias, out, starts_q, starts_k, max_q, max_k, sums, rate, seed, *_, **options):  # type: ignore[no-untyped-def]
        parts = plain(q[0], k[0], (starts_q, starts_k), rate, int(seed), options)
        grads = derive(grad[0], q[0], k[0], v[0], parts, options["scale"])
        return *(one[None] for one in grads), q.new_empty(0)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_efficient_attention_forward", forward, "CPU")
    library.impl("_efficient_attention_backward", backward, "CPU")
    return library
