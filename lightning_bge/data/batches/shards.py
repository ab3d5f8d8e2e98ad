"""The shard of each rank: which sequences of an effective batch it trains on."""

import heapq

import numpy as np


def balanced_shards(lengths: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Give sequences to ranks so that each has about as many tokens: the slowest rank decides the step.

    The longest sequence that is left goes to the rank with the fewest tokens so far, to the first where several have
    as few (the longest-processing-time rule; Graham 1969). No two shards differ by more tokens than the longest
    sequence has, and none is empty where there are as many sequences as ranks. Every rank computes this for itself.

    Args:
        lengths: tokens of each sequence, int [N], each at least 1.
        ranks: number of shards.

    Returns:
        For each rank positions into `lengths`, int64, ascending: together each position once. The same lengths always
        give the same shards.
    """
    if ranks == 1:
        return [np.arange(len(lengths))]
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    shards: list[list[int]] = [[] for _ in range(ranks)]
    fewest = [(0, rank) for rank in range(ranks)]  # sorted, and so a heap
    for position, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        tokens, rank = fewest[0]
        shards[rank].append(position)
        heapq.heapreplace(fewest, (tokens + length, rank))
    return [np.array(sorted(positions), dtype=np.int64) for positions in shards]
