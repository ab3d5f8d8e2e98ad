"""The steps at which a trial reports to its study, and what is kept of each report."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Steps:
    """What a trial that runs to its end reports, at the steps 1..total.

    Attributes:
        folds: number of folds; 1 is a single split.
        epochs: of each fold, at most.
        per_epoch: reports of each epoch.
    """

    folds: int
    epochs: int
    per_epoch: int = 1

    @property
    def per_fold(self) -> int:
        """Reports of a fold."""
        return self.epochs * self.per_epoch

    @property
    def total(self) -> int:
        """All reports of a trial."""
        return self.folds * self.per_fold


class Report(NamedTuple):
    """One validation of a fold.

    Attributes:
        step: the trial's report that it is, from 1; the last of them where one validation serves several.
        value: the metric.
        train_seconds: wall-clock seconds of training since the report before; the first one's start with the fold, so
            that building and setting up are in it.
        val_seconds: wall-clock seconds of the validation.
        train_cpu: seconds of the process's CPU time, all threads together, for the same work as `train_seconds`: on a
            machine that does other work as well, one thread's CPU seconds are what the work takes without it.
        val_cpu: likewise for the validation.
    """

    step: int
    value: float
    train_seconds: float
    val_seconds: float
    train_cpu: float
    val_cpu: float
