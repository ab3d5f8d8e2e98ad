"""Out of memory in any Lightning module: what failed is noted, memory is freed, the micro-batch size is lowered."""

from __future__ import annotations

import logging
import traceback
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bge.runtime.memory import OutOfMemory, find_oom, release

log = logging.getLogger(__name__)


class OOMHandler(Callback):
    """Notes every out-of-memory error of a `fit`, and lowers the micro-batch size of what makes the batches.

    A callback can't repeat a step of an automatically optimised module: where one runs out of memory, the error comes
    out of `fit` as it is, after this callback has noted it, dropped gradients and the locals of the frames that failed,
    given memory back, and halved the micro-batch size, so that the next `fit` begins with less. A module that repeats
    its steps itself (one with a `ladder`, as ours) goes on; its lower limit is handed on here, so that later batches
    are cut to it at once.

    The size is that of the data module, or of the module, if it has a `micro_batch_size` and a `set_micro_batch_size`;
    see `MicroBatchFinder`.

    Attributes:
        records: what failed during the last `fit`, oldest first. The last one ended it if `fit` raised.
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

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """What follows is the next batch; take over what the module's own ladder has found."""
        self._where = "data"
        self._take_over(trainer, pl_module)

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        """What follows is a validation step."""
        self._where = "validation"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What follows is the next batch."""
        self._where = "data"
        self._take_over(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Note what failed, in the error's attribute `oom` too, and free what it held; other errors are left alone."""
        self._take_over(trainer, pl_module)
        record = find_oom(exception, self._where)
        if record is None:
            return
        if record not in self.records:
            self.records.append(record)
        exception.oom = record  # type: ignore[attr-defined]  # whoever called `fit` finds here what was being done
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        drop_locals(exception)
        release()
        source = batch_source(trainer, pl_module)
        if source is not None and source.micro_batch_size > 1 and record.kind == "device":
            source.set_micro_batch_size(source.micro_batch_size // 2)
            log.warning("%s: the micro-batch size is %d from now on", record, source.micro_batch_size)

    def _take_over(self, trainer: Trainer, module: LightningModule) -> None:
        ladder = getattr(module, "ladder", None)
        if ladder is None or len(ladder.records) == len(self.records):
            return
        self.records = list(ladder.records)
        source = batch_source(trainer, module)
        # of several ranks each keeps its own limit to itself: they cut evaluation batches alike
        if source is None or ladder.limit is None or trainer.world_size > 1:
            return
        if ladder.limit < source.micro_batch_size:
            source.set_micro_batch_size(ladder.limit)


def batch_source(trainer: Trainer, module: LightningModule) -> Any:
    """The data module or module whose `micro_batch_size` can be set; None where there is none."""
    known = (getattr(trainer, "datamodule", None), module)
    return next(
        (thing for thing in known if hasattr(thing, "micro_batch_size") and hasattr(thing, "set_micro_batch_size")),
        None,
    )


def drop_locals(error: BaseException) -> None:
    """Clear the local variables of the finished frames that an error, and what led to it, hold alive."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
