"""A data module of encoded rows: how large their micro-batches are, and the loaders that cut them."""

from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule

from lightning_bge.data.batches.config import BatchingConfig
from lightning_bge.data.batches.loader import BatchLoader
from lightning_bge.data.batches.micro_batches import EncodedDataset
from lightning_bge.data.batches.samplers import EffectiveBatchSampler, eval_batches
from lightning_bge.types import Batch, Schema

Split = Literal["train", "val", "test", "predict"]


class EncodedDataModule(LightningDataModule):
    """Rows as token ids, in micro-batches whose size may change while a trainer runs.

    A subclass reads the rows in `setup`, into `_datasets` and `schema`. `MicroBatchFinder`, and the module's retries
    after out-of-memory errors, change the size.

    Args:
        batching: how rows become batches.

    Attributes:
        batching: as given.
        schema: what the model reads and predicts, after `setup`.
        batch_size: as given to the subclass.
        accumulated: how many batches of `batch_size` rows make an optimizer step; the trainer's
            `accumulate_grad_batches`.
    """

    schema: Schema | None
    batch_size: int

    def __init__(self, batching: BatchingConfig) -> None:
        super().__init__()
        self.batching = batching
        self.schema = None
        self.accumulated = 1
        self._micro_batch_size = batching.initial_max_tokens
        self._datasets: dict[str, EncodedDataset] = {}

    @property
    def rows_per_step(self) -> int:
        """Rows of an effective batch."""
        return self.batch_size * self.accumulated

    @property
    def micro_batch_size(self) -> int:
        """The most tokens of a training micro-batch, now in effect."""
        return self._micro_batch_size

    @property
    def eval_micro_batch_size(self) -> int:
        """The most tokens of a micro-batch without gradients, now in effect."""
        return self.batching.eval_limit(self._micro_batch_size)

    @property
    def micro_batch_size_step(self) -> int:
        """Tokens of the longest row: the smallest micro-batch size worth a try, after `setup`.

        Without windows no row is longer than `max_length`. With windows the rows that were read decide, rounded up to
        a multiple of `max_length`, as a row is never split.
        """
        assert self.schema is not None
        length = self.schema.max_length
        if self.schema.windows.stride is None:
            return length
        longest = max((int(each.tokens.lengths.max(initial=0)) for each in self._datasets.values()), default=0)
        return max(1, -(-longest // length)) * length

    @property
    def auto_micro_batch_size(self) -> bool:
        """Whether a micro-batch size is to be searched: `data.batching.max_tokens` is auto."""
        return self.batching.max_tokens == "auto"

    @property
    def micro_batch_size_key(self) -> dict[str, Any]:
        """What of the data the memory of a step depends on, besides the micro-batch size; after `setup`."""
        assert self.schema is not None
        fixed = self.batching.eval_max_tokens
        return {"max_length": self.schema.max_length, "labels": self.schema.num_outputs, "eval_max_tokens": fixed}

    def worst_case_batch(self, micro_batch_size: int, train: bool) -> Batch:
        """One micro-batch of as many sequences of `max_length` tokens as the size allows, at least one.

        Args:
            micro_batch_size: of a training micro-batch, in tokens.
            train: else a micro-batch without gradients, which is larger: see `data.batching.eval_max_tokens`.
        """
        assert self.schema is not None
        tokens = micro_batch_size if train else self.batching.eval_limit(micro_batch_size)
        length = self.schema.max_length
        return self._dataset("train").worst_case(max(tokens, self.micro_batch_size_step) // length, length)

    def set_micro_batch_size(self, size: int) -> None:
        """Change the size of micro-batches, in loaders that exist too (with 0 workers at once).

        Args:
            size: tokens of a training micro-batch; those without gradients follow where `data.batching.eval_max_tokens`
                is auto.
        """
        self._micro_batch_size = size
        for name, dataset in self._datasets.items():
            dataset.set_max_tokens(size if name == "train" else self.eval_micro_batch_size)

    def _eval_loader(self, name: Split, rows: np.ndarray | None = None) -> BatchLoader:
        dataset = self._dataset(name)
        rows = np.arange(len(dataset)) if rows is None else rows
        # By the size that was configured, not the one in effect: all ranks must deal alike, and a size that was found,
        # or lowered on one rank, cuts what is dealt.
        limit = self.batching.eval_limit(self.batching.initial_max_tokens)
        batches = eval_batches(rows, dataset.tokens.lengths, limit, *self._rank())
        return BatchLoader(dataset, batches, self.batching)

    def _sampler(self, rows: np.ndarray, classes: np.ndarray | None) -> EffectiveBatchSampler:
        """Effective batches of training rows; with `trainer.overfit_batches` the same ones in each epoch."""
        overfits = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return EffectiveBatchSampler(rows, self.rows_per_step, self.batching.seed, classes, same_order=overfits)

    def _dataset(self, name: Split) -> EncodedDataset:
        if name not in self._datasets:
            raise RuntimeError(f"the {name} rows have not been read: call setup() for their stage first")
        return self._datasets[name]

    def _rank(self) -> tuple[int, int]:
        """This process's rank, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
