"""Effective batches in random order, cut into micro-batches of sequences laid end to end."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_bge.data.batches.shards import balanced_shards
from lightning_bge.data.batches.workers import PREFETCHED, LoaderChoice, choose_once, choose_workers
from lightning_bge.data.tokens.cache import TokenArrays
from lightning_bge.errors import ConfigError
from lightning_bge.types import Batch, MicroBatch

EXAMPLES = 20  # batches that are timed to choose the number of workers
TOKENS = 8192  # what auto begins with
EVAL_FACTOR = 2  # without gradients few activations are kept


@dataclass(frozen=True)
class BatchingConfig:
    """How rows become batches.

    Args:
        max_tokens: the most tokens of a training micro-batch (real tokens, there is no padding). It changes memory and
            speed, not the result. auto: 8192, until a search for a better one (`MicroBatchFinder`) or running out of
            memory says otherwise.
        eval_max_tokens: the most tokens of a micro-batch without gradients. auto: twice that of training.
        balanced: draw every class with equal probability, with replacement.
        seed: of the training order; apart from the other seeds so that trials can be compared pair by pair.
        num_workers: processes that assemble batches. auto: measured once; 0 where rows are assembled faster than
            another process could hand them over, as tokenised rows are.
        pin_memory: copy batches into page-locked memory. Unset: where CUDA is available.
        persistent_workers: keep the processes between epochs; of no effect with 0 workers.
        multiprocessing_context: how processes start. Unset: forkserver where there is one, else spawn; a fork of a
            process that runs threads may hang.
    """

    max_tokens: int | Literal["auto"] = "auto"
    eval_max_tokens: int | Literal["auto"] = "auto"
    balanced: bool = False
    seed: int = 42
    num_workers: int | Literal["auto"] = "auto"
    pin_memory: bool | None = None
    persistent_workers: bool = True
    multiprocessing_context: str | None = None

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"data.batching.seed must be at least 0, got {self.seed}")
        for name in ("max_tokens", "eval_max_tokens"):
            value = getattr(self, name)
            if value != "auto" and (type(value) is not int or value < 1):
                raise ConfigError(f"data.batching.{name} must be auto, or 1 or more tokens, got {value!r}")
        workers = self.num_workers
        if workers != "auto" and (type(workers) is not int or workers < 0):
            raise ConfigError(f"data.batching.num_workers must be auto, or 0 or more processes, got {workers!r}")
        known = multiprocessing.get_all_start_methods()
        if self.multiprocessing_context not in (None, *known):
            raise ConfigError(
                f"data.batching.multiprocessing_context must be unset or one of {', '.join(known)}, "
                f"got {self.multiprocessing_context!r}"
            )


def cut(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Cut sequences into runs of similar length.

    Args:
        lengths: tokens of each sequence, int [N].
        max_tokens: the most tokens of a run; a longer sequence makes a run of its own.

    Returns:
        Positions into `lengths`, int64; the longest come first, equal ones in the given order.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64)[order])
    runs, start = [], 0
    while start < len(order):
        used = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, used + max_tokens, side="right")))
        runs.append(order[start:stop])
        start = stop
    return runs


class EffectiveBatchSampler(Sampler[list[int]]):
    """Row numbers of one effective batch after the other, in an order given by (seed, epoch) alone.

    Every row comes once an epoch, and the last batch may be smaller. With `classes`, as many rows are drawn with
    replacement, all classes with equal probability.

    Attributes:
        epoch: set by `set_epoch`, which Lightning calls.
        skip: batches to leave out at the start of the next iteration only.
    """

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int, classes: np.ndarray | None = None) -> None:
        self.rows, self.batch_size, self.seed = np.asarray(rows, dtype=np.int64), batch_size, seed
        self.epoch = self.skip = 0
        self.weights: np.ndarray | None = None
        if classes is not None:
            _, inverse, counts = np.unique(classes, return_inverse=True, return_counts=True)
            self.weights = 1.0 / (counts[inverse] * len(counts))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        random = np.random.default_rng((self.seed, self.epoch))
        if self.weights is None:
            order = random.permutation(self.rows)
        else:
            order = random.choice(self.rows, size=len(self.rows), p=self.weights)
        for start in range(skip * self.batch_size, len(order), self.batch_size):
            yield order[start : start + self.batch_size].tolist()

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def examples(self, count: int) -> list[list[int]]:
        """Batches like those to come, for measurements; the order of those to come is not touched."""
        if not len(self.rows):
            return []
        size = min(self.batch_size, len(self.rows))
        return np.random.default_rng(self.seed).choice(self.rows, size=(count, size)).tolist()


class EvalSampler(Sampler[list[int]]):
    """Row numbers of one micro-batch after the other, longest sequences first, each row once.

    Several ranks take the micro-batches in turns. All make as many, as Lightning wants it; the last may be empty.

    Attributes:
        rank: which rank's.
        ranks: how many there are.
    """

    def __init__(self, rows: np.ndarray, lengths: np.ndarray, tokens: int) -> None:
        rows = np.asarray(rows, dtype=np.int64)
        self.batches = [rows[run].tolist() for run in cut(lengths[rows], tokens)]
        self.skip, self.rank, self.ranks = 0, 0, 1

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        mine = self.batches[self.rank :: self.ranks]
        mine += [[]] * (len(self) - len(mine))
        return iter(mine[skip:])

    def __len__(self) -> int:
        return -(-len(self.batches) // self.ranks)

    def examples(self, count: int) -> list[list[int]]:
        """Some of the batches, for measurements."""
        return self.batches[:: max(1, len(self.batches) // count)]


class EncodedDataset(Dataset[Batch]):
    """A file's rows as token ids and labels; an item is the `Batch` of a list of row numbers.

    Args:
        tokens: token ids of all rows of the file.
        labels: encoded labels of all rows, or None.
        groups: int64 [N], a group number for each row, or None.
        max_tokens: the most tokens of a micro-batch.

    Attributes:
        rank: of several ranks the one whose shard an item is.
        ranks: how many there are; an item of the only one holds all rows.
    """

    def __init__(
        self, tokens: TokenArrays, labels: np.ndarray | None, groups: np.ndarray | None, max_tokens: int
    ) -> None:
        self.tokens, self.labels, self.groups, self.max_tokens = tokens, labels, groups, max_tokens
        self.rank, self.ranks = 0, 1

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        chosen = np.asarray(rows, dtype=np.int64)
        sizes: tuple[int, ...] = ()
        if self.ranks > 1:
            dealt = [chosen[shard] for shard in balanced_shards(self.tokens.lengths[chosen], self.ranks)]
            chosen, sizes = dealt[self.rank], tuple(int(self.tokens.lengths[shard].sum()) for shard in dealt)
        runs = cut(self.tokens.lengths[chosen], self.max_tokens)
        return Batch(tuple(self._micro(chosen[run]) for run in runs), sizes)

    def worst_case(self, sequences: int, length: int) -> Batch:
        """Sequences that are all of `length` tokens, in one micro-batch: random ids, labels and groups of the file."""
        random = np.random.default_rng(sequences)
        rows, tokens = random.integers(len(self), size=sequences), self.tokens
        total = sequences * length
        types = tokens.token_type_ids
        made = TokenArrays(
            input_ids=random.integers(self._top_id + 1, size=total, dtype=np.int32),
            offsets=np.arange(sequences + 1) * length,
            token_type_ids=None if types is None else types[np.arange(total) % len(types)],
            lengths=np.full(sequences, length, dtype=np.int32),
            path=tokens.path,
        )
        labels = None if self.labels is None else self.labels[rows]
        groups = None if self.groups is None else self.groups[rows]
        return EncodedDataset(made, labels, groups, total)[range(sequences)]

    @cached_property
    def _top_id(self) -> int:
        """The highest id of the file."""
        return int(self.tokens.input_ids.max())

    def _micro(self, rows: np.ndarray) -> MicroBatch:
        tokens = self.tokens
        lengths = tokens.lengths[rows].astype(np.int64)
        ends = np.cumsum(lengths)
        total = np.arange(ends[-1])
        # Where each token of the micro-batch lies in its own sequence, and then in the file.
        positions = total - np.repeat(ends - lengths, lengths)
        source = positions + np.repeat(tokens.offsets[rows], lengths)
        types = tokens.token_type_ids

        def pick(values: np.ndarray | None) -> torch.Tensor | None:
            return None if values is None else torch.from_numpy(values[rows])

        return MicroBatch(
            input_ids=torch.from_numpy(tokens.input_ids[source].astype(np.int64)),
            positions=torch.from_numpy(positions),
            cu_seqlens=torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)),
            lengths=tuple(lengths.tolist()),
            rows=torch.from_numpy(rows),
            token_type_ids=None if types is None else torch.from_numpy(types[source].astype(np.int64)),
            labels=pick(self.labels),
            groups=pick(self.groups),
        )


def _data_loader(
    dataset: EncodedDataset, batches: Sampler[list[int]] | list[list[int]], config: BatchingConfig, num_workers: int
) -> DataLoader:
    context = config.multiprocessing_context
    if context is None and num_workers:
        methods = multiprocessing.get_all_start_methods()
        context = "forkserver" if "forkserver" in methods else "spawn"
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=batches,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available() if config.pin_memory is None else config.pin_memory,
        persistent_workers=config.persistent_workers and num_workers > 0,
        multiprocessing_context=context if num_workers else None,
        # Its seeds for workers would else be drawn from the global generator, and a resumed run, which draws them at
        # another step, would see other dropout masks.
        generator=torch.Generator(),
    )


def _choose(
    dataset: EncodedDataset, sampler: EffectiveBatchSampler | EvalSampler, config: BatchingConfig
) -> LoaderChoice:
    if config.num_workers != "auto":
        return LoaderChoice(config.num_workers, "as data.batching.num_workers says", {})

    def make_loader(workers: int) -> DataLoader:
        examples = sampler.examples(EXAMPLES)
        repeats = -(-(EXAMPLES + 2 + PREFETCHED * workers) // max(1, len(examples)))
        return _data_loader(dataset, examples * repeats, config, workers)

    rows = sampler.batch_size if isinstance(sampler, EffectiveBatchSampler) else None
    key = (type(dataset).__name__, len(dataset), dataset.max_tokens, rows)
    return choose_once(key, lambda: choose_workers(make_loader, batches=EXAMPLES))


class BatchLoader:
    """A `DataLoader` that Lightning can resume in the middle of an epoch.

    It holds a `DataLoader` instead of being one: Lightning warns about few workers and swaps samplers where it finds
    the class itself, and both would be wrong here. Lightning calls `set_epoch` only after `iter()`, so nothing is drawn
    before the first batch is asked for.

    Attributes:
        sampler: Lightning looks for its `set_epoch`.
        batch_sampler: None, as in a `DataLoader` whose sampler gives whole batches; Lightning reads it.
        choice: the number of worker processes, and why.
    """

    batch_sampler = None

    def __init__(
        self, dataset: EncodedDataset, sampler: EffectiveBatchSampler | EvalSampler, config: BatchingConfig
    ) -> None:
        self.sampler = sampler
        self.choice = _choose(dataset, sampler, config)
        self._loader = _data_loader(dataset, sampler, config, self.choice.num_workers)
        self._epoch = self._served = 0
        self._resume: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        resume, self._resume = self._resume, None
        self._epoch, self._served = getattr(self.sampler, "epoch", 0), 0
        # A state of another epoch, or of a whole one, has nothing left to skip.
        if resume is not None and resume["epoch"] == self._epoch and resume["batches"] < len(self):
            self._served = resume["batches"]
        self.sampler.skip = self._served
        for batch in self._loader:
            self._served += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the number of its batches handed out so far."""
        return {"epoch": self._epoch, "batches": self._served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on where `state` was taken, if it is of the same epoch."""
        self._resume = dict(state)
