"""Cut effective batches into micro-batches of rows laid end to end, by a maximum of tokens."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import Dataset

from lightning_bge.data.batches.shards import balanced_shards
from lightning_bge.data.tokens.cache import TokenArrays, concatenate_tokens
from lightning_bge.runtime.cache_dir import mark_used
from lightning_bge.tokenization import Pooling
from lightning_bge.types import Batch, MicroBatch


def cut_micro_batches(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Cut rows into micro-batches of similar length.

    Args:
        lengths: tokens of each row, int [N].
        max_tokens: the most tokens of a micro-batch; a longer row is a micro-batch of its own.

    Returns:
        For each micro-batch positions into `lengths`, int64; the longest come first, equal ones in the given order.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    parts, start = [], 0
    while start < len(order):
        used = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, used + max_tokens, side="right")))
        parts.append(order[start:stop])
        start = stop
    return parts


class EncodedDataset(Dataset[Batch]):
    """A file's rows as token ids and labels; an item is the `Batch` of a list of row numbers.

    With several ranks an item holds this rank's shard of these rows.

    Args:
        tokens: token ids of all rows of the file.
        labels: encoded labels of all rows, or None.
        groups: int64 [N], a group number for each row, or None.
        max_tokens: the most tokens of a micro-batch.
        pooling: how the logits of a row's windows become those of the row, where the tokens have windows.
    """

    def __init__(
        self,
        tokens: TokenArrays,
        labels: np.ndarray | None,
        groups: np.ndarray | None,
        max_tokens: int,
        pooling: Pooling = "mean",
    ) -> None:
        self.tokens, self.labels, self.groups, self.max_tokens = tokens, labels, groups, max_tokens
        self.pooling = pooling
        mark_used(tokens.path)  # the trials of a study read the file once, and its workers open it later
        self.rank, self.ranks = 0, 1

    def set_max_tokens(self, max_tokens: int) -> None:
        """Change the most tokens of a micro-batch, for the items to come."""
        self.max_tokens = max_tokens

    def set_rank(self, rank: int, ranks: int) -> None:
        """Choose whose shard an item is: that of `rank` (from 0), of `ranks` in all."""
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        chosen = np.asarray(rows, dtype=np.int64)
        shard_tokens: tuple[int, ...] = ()
        if self.ranks > 1:
            shards = [chosen[shard] for shard in balanced_shards(self.tokens.lengths[chosen], self.ranks)]
            chosen, shard_tokens = shards[self.rank], tuple(int(self.tokens.lengths[shard].sum()) for shard in shards)
        parts = cut_micro_batches(self.tokens.lengths[chosen], self.max_tokens)
        return Batch(tuple(self._micro_batch(chosen[part]) for part in parts), shard_tokens)

    def worst_case(self, sequences: int, length: int) -> Batch:
        """One micro-batch of sequences that all have `length` tokens, with random ids, labels, groups of the file."""
        random = np.random.default_rng(sequences)
        rows, tokens = random.integers(len(self), size=sequences), self.tokens
        total = sequences * length
        types = tokens.token_type_ids
        generated = TokenArrays(
            input_ids=random.integers(self._highest_id + 1, size=total, dtype=np.int32),
            offsets=np.arange(sequences + 1) * length,
            token_type_ids=None if types is None else types[np.arange(total) % len(types)],
            lengths=np.full(sequences, length, dtype=np.int32),
            path=tokens.path,
        )
        labels = None if self.labels is None else self.labels[rows]
        groups = None if self.groups is None else self.groups[rows]
        return EncodedDataset(generated, labels, groups, total)[range(sequences)]

    @cached_property
    def _highest_id(self) -> int:
        return int(self.tokens.input_ids.max())

    def _micro_batch(self, rows: np.ndarray) -> MicroBatch:
        tokens = self.tokens
        lengths = tokens.lengths[rows].astype(np.int64)
        positions = _count_up(lengths)
        source = positions + np.repeat(tokens.offsets[rows], lengths)  # where each token is in the file
        windows, sequences = None, lengths
        if tokens.window_offsets is not None and tokens.window_lengths is not None:
            first = tokens.window_offsets[rows]
            windows = tokens.window_offsets[rows + 1] - first
            sequences = tokens.window_lengths[_count_up(windows) + np.repeat(first, windows)].astype(np.int64)
            positions = _count_up(sequences)
        types = tokens.token_type_ids

        def pick(values: np.ndarray | None) -> torch.Tensor | None:
            return None if values is None else torch.from_numpy(values[rows])

        return MicroBatch(
            input_ids=torch.from_numpy(tokens.input_ids[source].astype(np.int64)),
            positions=torch.from_numpy(positions),
            cu_seqlens=torch.from_numpy(np.concatenate(([0], np.cumsum(sequences))).astype(np.int32)),
            lengths=tuple(sequences.tolist()),
            rows=torch.from_numpy(rows),
            token_type_ids=None if types is None else torch.from_numpy(types[source].astype(np.int64)),
            labels=pick(self.labels),
            groups=pick(self.groups),
            windows=None if windows is None else tuple(windows.tolist()),
            pooling=self.pooling,
        )


def _count_up(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... anew for each of `lengths`, end to end: int64."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)


def concatenate_datasets(
    first: EncodedDataset, second: EncodedDataset, group_names: tuple[tuple[str, ...], tuple[str, ...]]
) -> tuple[EncodedDataset, tuple[str, ...]]:
    """The rows of two files with labels, one after the other.

    Args:
        first: its rows come first, and its limit of tokens is kept.
        second: of the same tokenizer and labels.
        group_names: those of each file, in the order of its group numbers; empty where there are no groups.

    Returns:
        All rows, and the names of their groups, in the order of their new numbers.
    """
    assert first.labels is not None
    assert second.labels is not None
    groups, names = None, group_names[0]
    if first.groups is not None and second.groups is not None:
        unique, numbers = np.unique(np.array(group_names[0] + group_names[1], dtype=object), return_inverse=True)
        groups = numbers[np.concatenate((first.groups, second.groups + len(group_names[0])))]
        names = tuple(unique.tolist())
    tokens = concatenate_tokens(first.tokens, second.tokens)
    labels = np.concatenate((first.labels, second.labels))
    return EncodedDataset(tokens, labels, groups, first.max_tokens, first.pooling), names
