"""The loader of batches: a `DataLoader` that Lightning can resume in the middle of an epoch."""

import logging
import multiprocessing
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from lightning_bge.data.batches.config import BatchingConfig
from lightning_bge.data.batches.micro_batches import EncodedDataset
from lightning_bge.data.batches.samplers import EffectiveBatchSampler
from lightning_bge.types import Batch

log = logging.getLogger(__name__)


class _Remaining(Sampler[list[int]]):
    """The batches of an epoch that are still to come."""

    def __init__(self, batches: EffectiveBatchSampler | list[list[int]]) -> None:
        self._batches, self._start = batches, 0

    def start_at(self, number: int) -> None:
        """Leave out this many batches at the start of each iteration."""
        self._start = number

    def __iter__(self) -> Iterator[list[int]]:
        return islice(self._batches, self._start, None)


class BatchLoader:
    """A `DataLoader` that Lightning can resume in the middle of an epoch.

    It holds a `DataLoader` instead of being one: Lightning warns about few workers and replaces samplers where it finds
    the class itself, and both would be wrong here. Lightning calls `set_epoch` only after `iter()`, so nothing is drawn
    before the first batch is requested.

    Args:
        dataset: makes a batch of row numbers.
        sampler: the row numbers of each batch.
        config: worker processes and pinned memory.

    Attributes:
        sampler: Lightning calls its `set_epoch`, if it has one.
        batch_sampler: None, as in a `DataLoader` whose sampler gives whole batches; Lightning reads it.
        num_workers: processes that assemble batches.
        persistent_workers: whether they are kept between epochs.
        pin_memory: whether batches are copied into page-locked memory.
        workers_reason: why there are as many workers.
    """

    batch_sampler = None

    def __init__(
        self, dataset: EncodedDataset, sampler: EffectiveBatchSampler | list[list[int]], config: BatchingConfig
    ) -> None:
        self.sampler, self.num_workers = sampler, config.num_workers
        self.persistent_workers = config.persistent_workers and config.num_workers > 0
        self.pin_memory = torch.cuda.is_available() if config.pin_memory is None else config.pin_memory
        self.workers_reason = (
            "as data.batching.num_workers says"
            if config.num_workers
            else "rows are tokenized and in memory, and are assembled faster than a worker could hand them over"
        )
        self._remaining = _Remaining(sampler)
        self._loader = self._data_loader(dataset, config.multiprocessing_context)
        self._epoch = self._served = 0
        self._resume: dict[str, Any] | None = None
        _log_workers(self.num_workers, self.workers_reason)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        resume, self._resume = self._resume, None
        self._epoch, self._served = getattr(self.sampler, "epoch", 0), 0
        # A state of another epoch, or of a whole one, has nothing left to skip.
        if resume is not None and resume["epoch"] == self._epoch and resume["batches"] < len(self):
            self._served = resume["batches"]
        self._remaining.start_at(self._served)
        for batch in self._loader:
            self._served += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the number of its batches handed out so far."""
        return {"epoch": self._epoch, "batches": self._served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue where `state` was taken, if it is of the same epoch."""
        self._resume = dict(state)

    def _data_loader(self, dataset: EncodedDataset, context: str | None) -> DataLoader:
        if context is None:
            context = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=self._remaining,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.persistent_workers,
            multiprocessing_context=context if self.num_workers else None,
            # Its seeds for workers would else be drawn from the global generator, and a resumed run, which draws them
            # at another step, would see other dropout masks.
            generator=torch.Generator(),
        )


@lru_cache
def _log_workers(num_workers: int, reason: str) -> None:
    """Log the number of workers with its reason: once for each number in a process, as a study makes many loaders."""
    log.info("num_workers %d: %s", num_workers, reason)
