"""The micro-batches of an ordinary LightningModule: the batch size of its DataLoader, with accumulated gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_setattr
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_bge.errors import ConfigError
from lightning_bge.runtime.compat.lightning import drop_loaders, train_loader, validation_loaders
from lightning_bge.runtime.compat.torch import tree_leaves

SCANNED = 1024  # samples whose sizes are compared, evenly spaced over the dataset; all of a smaller one
LARGEST = 64  # of them, of which trial batches consist
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
SET = ("accumulate_grad_batches", "limit_train_batches", "limit_val_batches", "val_check_interval")  # of the trainer


@dataclass(frozen=True)
class _Samples:
    """The largest samples that were seen of a DataLoader's dataset, and how it makes a batch of them."""

    samples: list[Any]
    collate: Callable[[list[Any]], Any]
    batch_size: int

    def batch(self, rows: int) -> Any:
        return self.collate([self.samples[row % len(self.samples)] for row in range(rows)])


class DataLoaderSource:
    """A batch source (see `SupportsMicroBatchSize`) out of the attribute that holds the batch size of a project.

    The effective batch that is asked for has `batch_size * accumulate_grad_batches` rows. A smaller batch size makes
    the same effective batches of the same rows: it divides the effective batch, and the rows after which an epoch
    ends before its data do or a validation begins. `accumulate_grad_batches`, `limit_train_batches`,
    `val_check_interval` and an integer `limit_val_batches` of the trainer are set accordingly.

    Args:
        trainer: in `fit`, with the module and its data; no loader is iterated.
        module: with automatic optimization. Its loss is the mean over the rows of a batch.
        name: of the attribute, which Lightning looks for in the module, its hparams, and the data module.

    Attributes:
        micro_batch_size: rows of a batch.
        effective: rows of an optimizer step, on each rank.
        rows: rows of an epoch, on each rank.
        sizes: all batch sizes that make the same effective batches, in increasing order; where the module has batch
            normalization, those that make no batch of a single row, which it refuses.
        micro_batch_size_step: rows of the smallest trial batch.
        micro_batch_size_key: what of the data the memory of a step depends on.

    Raises:
        ConfigError: the batch size is no number, the loaders are not made with it, or their rows can't be counted.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, name: str) -> None:
        self.trainer, self.module, self.name = trainer, module, name
        size: Any = lightning_getattr(module, name)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"{name}: expected the rows of a batch, 1 or more, got {size!r}")
        self.micro_batch_size = self._asked = size
        self._before = {option: getattr(trainer, option) for option in SET}
        self.effective = size * trainer.accumulate_grad_batches
        loader = self._checked(train_loader(trainer), size)
        self.rows, self._ends = self._plan(loader)
        self.micro_batch_size_step = 2 if any(isinstance(part, BATCH_NORMS) for part in module.modules()) else 1
        self.sizes = self._find_sizes(gcd(self.effective, *self._ends.values()))
        self._train = _largest_samples(loader)
        self._validation = self._validation_samples()
        self.micro_batch_size_key = {
            "train": [_shape(leaf) for leaf in tree_leaves(self._train.samples[0])],
            "validation": self._validation
            and [self._validation.batch_size, [_shape(leaf) for leaf in tree_leaves(self._validation.samples[0])]],
            "rows": [self.effective, self.most],
        }

    def _checked(self, loader: Any, size: int) -> DataLoader[Any]:
        """A loader whose batches have so many rows."""
        if not isinstance(loader, DataLoader):
            got: str | None = type(loader).__name__
        elif isinstance(loader.dataset, IterableDataset):
            got = "an iterable dataset"
        else:
            got = None if hasattr(loader.sampler, "__len__") else f"the sampler {type(loader.sampler).__name__}"
        if got is not None:
            raise ConfigError(
                "MicroBatchFinder: expected train_dataloader to return one DataLoader whose dataset and sampler have "
                f"lengths, got {got}; make the data module a batch source with the methods of SupportsMicroBatchSize"
            )
        if loader.batch_size != size:
            raise ConfigError(
                f"MicroBatchFinder: expected train_dataloader to make a DataLoader of batch_size={self.name}, which is "
                f"{size}, got batch_size {loader.batch_size}; read {self.name} in train_dataloader, without a "
                "batch_sampler"
            )
        return loader

    def _plan(self, loader: DataLoader[Any]) -> tuple[int, dict[str, int]]:
        """Rows of an epoch, and those after which something ends, by the trainer's option."""
        trainer, size, batches = self.trainer, self._asked, len(loader)
        limit: Any = trainer.limit_train_batches
        batches = min(limit, batches) if isinstance(limit, int) else int(limit * batches)
        rows = min(batches * size, len(loader.sampler))  # type: ignore[arg-type]
        ends = {} if batches * size >= len(loader.sampler) else {"limit_train_batches": rows}  # type: ignore[arg-type]
        every: Any = trainer.val_check_interval
        if isinstance(every, int | float) and trainer.enable_validation:
            over_epochs = trainer.check_val_every_n_epoch is None
            if over_epochs and rows % size:
                raise ConfigError(
                    "MicroBatchFinder: trainer.check_val_every_n_epoch is None: expected epochs of whole batches, got "
                    f"{rows} rows in batches of {size}; set check_val_every_n_epoch, or drop_last of the DataLoader"
                )
            every = every if isinstance(every, int) else max(1, int(batches * every))
            if every < batches or over_epochs:
                ends["val_check_interval"] = every * size
        if isinstance(trainer.limit_val_batches, int) and self._validates_with_it():
            ends["limit_val_batches"] = trainer.limit_val_batches * size
        return rows, ends

    def _find_sizes(self, unit: int) -> list[int]:
        least = self.micro_batch_size_step
        whole = [rows for rows in range(1, unit + 1) if unit % rows == 0]
        good = [
            rows for rows in whole if rows == self._asked or (rows >= least and (self.rows % rows or least) >= least)
        ]
        more = [rows for rows in good if rows >= self.rows]
        return [rows for rows in good if rows < self.rows] + more[:1]  # at most one batch for a whole epoch

    def _validates_with_it(self) -> bool:
        """Whether the loaders of validation are made with the batch size, too."""
        loaders = validation_loaders(self.trainer) if self.trainer.enable_validation else []
        return bool(loaders) and all(getattr(loader, "batch_size", None) == self._asked for loader in loaders)

    def _validation_samples(self) -> _Samples | None:
        """The samples of the first loader of validation."""
        loaders = validation_loaders(self.trainer) if self.trainer.enable_validation else []
        if not loaders:
            return None
        loader = loaders[0]
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or not loader.batch_size:
            raise ConfigError(
                "MicroBatchFinder: expected val_dataloader to return a DataLoader with a batch_size, of a dataset with "
                f"a length, got {type(loader).__name__}; make the data module a batch source with the methods of "
                "SupportsMicroBatchSize"
            )
        return _largest_samples(loader)

    # ------------------------------------------------------------------ what MicroBatchFinder asks for

    @property
    def least(self) -> int:
        """Rows that a batch of the smallest of `sizes` has."""
        return min(self.sizes[0], self.rows)

    @property
    def most(self) -> int:
        """Rows that a batch of the largest of `sizes` has."""
        return min(self.sizes[-1], self.rows)

    def largest_size(self, rows: int) -> int:
        """The largest of `sizes` whose batches have at most so many rows."""
        return max((size for size in self.sizes if min(size, self.rows) <= rows), default=self.sizes[0])

    def worst_case_batch(self, micro_batch_size: int, train: bool) -> Any:
        """A batch of the largest samples, which are repeated as needed.

        A validation batch has as many rows where its loader is made with the batch size, else its loader's.
        """
        if train:
            return self._train.batch(micro_batch_size)
        assert self._validation is not None
        fixed = self._validation.batch_size
        return self._validation.batch(micro_batch_size if fixed == self._asked else fixed)

    def set_micro_batch_size(self, size: int) -> None:
        """Have Lightning make its loaders anew, with that batch size, and accumulate the same effective batches."""
        self.micro_batch_size = size
        if size == self._asked:
            return
        lightning_setattr(self.module, self.name, size)
        self.trainer.accumulate_grad_batches = self.effective // size
        for option, rows in self._ends.items():
            setattr(self.trainer, option, rows // size)
        if "val_check_interval" not in self._ends and isinstance(self.trainer.val_check_interval, int | float):
            self.trainer.val_check_interval = 1.0  # where the epoch ends
        drop_loaders(self.trainer)

    def check(self) -> None:
        """Check, when training starts, that the loader has the batch size that was set."""
        self._checked(self.trainer.train_dataloader, self.micro_batch_size)

    def loss_factor(self, batch_idx: int) -> float:
        """What a batch's loss is to be multiplied by, so that a step has the mean loss over the rows of its batches.

        Lightning divides the mean loss of each batch by `accumulate_grad_batches`, also where the batch, or the last
        effective batch of an epoch, has fewer rows. 1.0 everywhere else.
        """
        size, count = self.micro_batch_size, self.effective // self.micro_batch_size
        done = batch_idx // count * self.effective
        rows = min(size, self.rows - batch_idx * size)
        return count * rows / min(self.effective, self.rows - done)

    def restore(self) -> None:
        """Give module and trainer back what was asked for, for a next `fit`."""
        lightning_setattr(self.module, self.name, self._asked)
        for option, value in self._before.items():
            setattr(self.trainer, option, value)

    def restore_in(self, checkpoint: dict[str, Any]) -> None:
        """Have a checkpoint hold the batch size that was asked for, among the hyperparameters."""
        for key in ("hyper_parameters", "datamodule_hyper_parameters"):
            if self.name in checkpoint.get(key, {}):
                checkpoint[key] = {**checkpoint[key], self.name: self._asked}


def _largest_samples(loader: DataLoader[Any]) -> _Samples:
    dataset: Any = loader.dataset
    count = min(len(dataset), SCANNED)
    if count == 0:
        raise ConfigError("MicroBatchFinder: expected a dataset of 1 sample or more, got an empty one")
    found: list[tuple[int, int, Any]] = []  # the number keeps samples from being compared
    for number in range(count):
        sample = dataset[number * len(dataset) // count]
        found.append((-sum(_size(leaf) for leaf in tree_leaves(sample)), number, sample))
        if len(found) >= 2 * LARGEST:
            found = sorted(found)[:LARGEST]
    samples = [sample for *_, sample in sorted(found)[:LARGEST]]
    return _Samples(samples, loader.collate_fn, loader.batch_size or 1)


def _size(leaf: Any) -> int:
    """Bytes of a part of a sample; 8 for a number."""
    if isinstance(leaf, Tensor | np.ndarray):
        return int(leaf.nbytes)
    return len(leaf) if isinstance(leaf, str | bytes) else 8


def _shape(leaf: Any) -> str:
    if isinstance(leaf, Tensor | np.ndarray):
        return f"{tuple(leaf.shape)} {leaf.dtype}"
    return f"{type(leaf).__name__} {_size(leaf)}"
