"""The steps at which a trial reports to its study, and what is kept of each report."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Steps:
    """The steps 1..total at which a trial that runs to its end reports.

    Attributes:
        folds: number of folds; 1 is a single split.
        epochs: of each fold, at most.
        per_epoch: steps of each epoch.
    """

    folds: int
    epochs: int
    per_epoch: int = 1

    @property
    def per_fold(self) -> int:
        """Steps of a fold."""
        return self.epochs * self.per_epoch

    @property
    def total(self) -> int:
        """Steps of a trial."""
        return self.folds * self.per_fold


class Report(NamedTuple):
    """One validation of a fold.

    Attributes:
        step: of the trial, from 1; the last of them where one validation counts for several steps.
        value: the metric.
        train_seconds: wall-clock seconds of training since the validation before; those of the first one start with the
            fold, and contain building and setting up.
        val_seconds: wall-clock seconds of the validation.
        train_cpu: seconds of the process's CPU time, all threads together, for the same work as `train_seconds`: on a
            machine that does other work as well, one thread's CPU seconds are what the work takes without it.
        val_cpu: seconds of the process's CPU time for the validation.
        loss: of the validation, as `val_loss` is logged; None: it is not.
    """

    step: int
    value: float
    train_seconds: float
    val_seconds: float
    train_cpu: float
    val_cpu: float
    loss: float | None = None
