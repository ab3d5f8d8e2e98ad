"""Out of memory in any Lightning module: note what failed, free memory, begin the next run with less."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.runtime.micro_batch import batch_source
from lightning_bge.runtime.oom import OutOfMemory, clean_up, record_oom

log = logging.getLogger(__name__)


class OOMHandler(Callback):
    """Handles an out-of-memory error that ends a `fit`: notes it, cleans up, and lowers the micro-batch size.

    A callback can't repeat a step: the error comes out of `fit` unchanged, after this callback has noted where it
    happened, dropped gradients and the locals of the frames that failed, given memory back, and halved the micro-batch
    size of the batch source (see `SupportsMicroBatchSize`), if there is one, so that the next `fit` begins with less. A
    `MicroBatchFinder` in the same trainer keeps the lower size, whichever of the two comes first. A module that repeats
    its steps itself, as `BGEClassifier` does, lets errors out only when nothing else helps.

    Attributes:
        records: the out-of-memory error that ended the last `fit`; empty where none did.
    """

    def __init__(self) -> None:
        self.records: list[OutOfMemory] = []
        self._where = "setup"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the run before."""
        self.records, self._where = [], "setup"

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        """What follows is a training step."""
        self._where = "forward"

    def on_before_backward(self, *_: Any, **__: Any) -> None:
        """What follows is the backward pass."""
        self._where = "backward"

    def on_before_optimizer_step(self, *_: Any, **__: Any) -> None:
        """What follows is the optimizer's step."""
        self._where = "optimizer"

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """What follows is the next batch."""
        self._where = "data"

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        """What follows is a validation step."""
        self._where = "validation"

    def on_validation_end(self, *_: Any, **__: Any) -> None:
        """What follows is the next batch."""
        self._where = "data"

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Note what failed, with the error too, and free what it held; other errors are left alone."""
        record = record_oom(exception, self._where)
        if record is None:
            return
        self.records.append(record)
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        clean_up(exception)
        source = batch_source(trainer, pl_module)
        if source is None or source.micro_batch_size <= 1 or record.kind != "device":
            return
        source.set_micro_batch_size(source.micro_batch_size // 2)
        log.warning("%s: the micro-batch size is %d from now on", record, source.micro_batch_size)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MicroBatchFinder):
                callback.lower(source.micro_batch_size)
