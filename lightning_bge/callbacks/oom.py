"""Out of memory in any Lightning module: note what failed, free memory, begin the next run with less."""

import logging
import traceback

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.runtime.micro_batch import batch_source
from lightning_bge.runtime.oom import OutOfMemory, clean_up, record_oom

log = logging.getLogger(__name__)

PLACES = {  # by the name of the innermost function on the stack that has one of these
    "training_step": "forward",
    "backward": "backward",
    "optimizer_step": "optimizer",
    "validation_step": "validation",
    "setup": "setup",
    "configure_model": "setup",
    "configure_optimizers": "setup",
}


class OOMHandler(Callback):
    """Handles an out-of-memory error that ends a `fit`: notes it, cleans up, and lowers the micro-batch size.

    A callback can't repeat a step: the error comes out of `fit` unchanged, after this callback has noted where it
    happened, dropped gradients and the locals of the frames that failed, given memory back, and halved the micro-batch
    size of the batch source (see `SupportsMicroBatchSize`), if there is one, so that the next `fit` begins with less. A
    `MicroBatchFinder` in the same trainer keeps the lower size, whichever of the two comes first, and that of an
    ordinary module too. A module that repeats its steps itself, as `BGEClassifier` does, lets errors out only when
    nothing else helps.

    Attributes:
        records: the out-of-memory error that ended the last `fit`; empty where none did.
    """

    def __init__(self) -> None:
        self.records: list[OutOfMemory] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the run before."""
        self.records = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Note what failed, with the error too, and free what it held; other errors are left alone."""
        record = record_oom(exception, _find_place(exception))
        if record is None:
            return
        self.records.append(record)
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        clean_up(exception)
        if record.kind == "device":
            _halve(trainer, pl_module, record)


def _halve(trainer: Trainer, module: LightningModule, record: OutOfMemory) -> None:
    """Halve the micro-batch size of the batch source, or what a `MicroBatchFinder` has found for an ordinary module."""
    finders = [one for one in trainer.callbacks if isinstance(one, MicroBatchFinder)]  # type: ignore[attr-defined]
    source = batch_source(trainer, module)
    before = (
        max((one.micro_batch_size or 0 for one in finders), default=0) if source is None else source.micro_batch_size
    )
    if before <= 1:
        return
    if source is not None:
        source.set_micro_batch_size(before // 2)
    log.warning("%s: the micro-batch size is %d from now on", record, before // 2)
    for finder in finders:
        finder.lower(before // 2)


def _find_place(error: BaseException) -> str:
    """What was being done when an error was raised; `data` where it was none of `PLACES`."""
    names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((PLACES[name] for name in reversed(names) if name in PLACES), "data")
