"""Callbacks of a fold of a trial: what stops it, and what is told of it while it trains."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from lightning_bge.hpo.trial.score import Monitor
from lightning_bge.runtime.distributed import as_the_first_decides
from lightning_bge.runtime.stop import Stopped, StopRequest


class LiveCurve(Callback):
    """Calls a function after each validation that does not end the trial.

    Args:
        write: the function.
    """

    def __init__(self, write: Callable[[], None]) -> None:
        self.write = write

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The validation was reported."""
        if not trainer.sanity_checking:
            self.write()


class StopOnRequest(Callback):
    """Ends training on request: after a batch, or after a validation.

    With several processes each has this callback, and the request of the first one counts, after a validation.

    Args:
        request: whether to stop.
        save: called with the trainer before; None: nothing is saved.
        within_epochs: whether it is called after a batch too.
    """

    def __init__(
        self,
        request: StopRequest,
        save: Callable[[Trainer], None] | None = None,
        within_epochs: bool = True,
    ) -> None:
        self.request, self.save, self.within_epochs = request, save, within_epochs

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A batch was trained. Where its validation follows, that comes first: Lightning would not make it up."""
        if trainer.world_size > 1:
            return
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if not (last or (batch_idx + 1) % (trainer.val_check_batch or math.inf) == 0):
            self._stop(trainer, self.within_epochs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The validation was reported; the callbacks before this one have ended the trial if it was to end."""
        if not trainer.sanity_checking:
            self._stop(trainer, saves=True)

    def _stop(self, trainer: Trainer, saves: bool) -> None:
        if found := as_the_first_decides(self.request.signal):
            if saves and self.save is not None:
                self.save(trainer)
            raise Stopped(signal.Signals(found).name)


class MonitorEarlyStopping(EarlyStopping):
    """That of the monitored metric, whose state is kept apart from that of the user's callbacks."""


def early_stopping(monitor: Monitor) -> list[Callback]:
    """Lightning's early stopping, where a patience is set."""
    if monitor.patience is None:
        return []
    mode = "max" if monitor.direction == "maximize" else "min"
    # a NaN prunes the trial, with its reason: see `FoldPruningCallback`
    options: dict[str, Any] = {"patience": monitor.patience, "min_delta": monitor.min_delta, "check_finite": False}
    return [MonitorEarlyStopping(monitor.logged, mode=mode, **options)]
