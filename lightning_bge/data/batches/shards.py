"""Each rank's share of an effective batch, computed by every rank for itself."""

from __future__ import annotations

import heapq

import numpy as np


def shares(lengths: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Deal sequences to ranks so that each has about as many tokens: the slowest rank decides the step.

    The longest sequence that is left goes to the rank with the fewest tokens so far, the first of several such (the
    longest-processing-time rule; Graham 1969). No two shares differ by more tokens than the longest sequence has, and
    none is empty where there are as many sequences as ranks.

    Args:
        lengths: tokens of each sequence, int [N], each at least 1.
        ranks: number of shares.

    Returns:
        For each rank positions into `lengths`, int64, ascending: together each position once. The same lengths always
        give the same shares.
    """
    if ranks == 1:
        return [np.arange(len(lengths))]
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    least = [(0, rank) for rank in range(ranks)]  # a heap as it is
    for position, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        tokens, rank = least[0]
        dealt[rank].append(position)
        heapq.heapreplace(least, (tokens + length, rank))
    return [np.array(sorted(positions), dtype=np.int64) for positions in dealt]
