"""What each tracker can do: hold a run for each trial of a study, and say what it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.loggers import Logger

from lightning_bge.hpo.trackers.record import Points, StudyRecord, TrialRecord, new_points


@dataclass(frozen=True)
class Known:
    """What a tracker has of the run of an ended trial.

    Attributes:
        state: the trial's; None: the run is not final.
        n_points: how many points it has.
    """

    state: str | None
    n_points: int

    def is_as(self, record: TrialRecord) -> bool:
        """Whether nothing is missing."""
        return (self.state, self.n_points) == (record.state, record.n_points)


class TrialRun(ABC):
    """The open run of one trial.

    Args:
        key: of the trial.
        logger: writes into the run.
        known: the points that it has already.
    """

    def __init__(self, key: str, logger: Logger, known: Points | None = None) -> None:
        self.key, self.logger = key, logger
        self.known: dict[str, dict[int, float]] = {name: dict(values) for name, values in (known or {}).items()}

    def log(self, record: TrialRecord) -> None:
        """Write the points that are new."""
        for step, values in new_points(record.points, self.known).items():
            self.logger.log_metrics(values, step)
            for name, value in values.items():
                self.known.setdefault(name, {})[step] = value
        self.flush()

    def flush(self) -> None:  # noqa: B027 - most have nothing to do
        """Make what was written visible to readers."""

    @abstractmethod
    def end(self, record: TrialRecord) -> None:
        """Write what is missing, and the final state."""


class Tracker(ABC):
    """The runs of a study's trials in one tracker. Every method may raise any error of the tracker's package.

    Args:
        options: of the tracker.
        study: the study.
    """

    name: ClassVar[str]

    def __init__(self, options: Mapping[str, str], study: StudyRecord) -> None:
        self.options, self.study = options, study

    @abstractmethod
    def open(self) -> None:
        """Reach the tracker, and create what all runs of the study have in common."""

    @abstractmethod
    def begin(self, record: TrialRecord) -> TrialRun:
        """Create the run of a trial that has begun."""

    @abstractmethod
    def known(self) -> dict[str, Known]:
        """What there is of each trial, by its key."""

    @abstractmethod
    def complete(self, record: TrialRecord) -> None:
        """Make the run of an ended trial what it has to be, whatever there is of it. One process at a time."""

    def end_lost(self, record: TrialRecord) -> None:  # noqa: B027 - where `complete` does it
        """Set the final state of the run of a trial whose process is gone, if there is one that is not final.

        Other processes may do so at the same time. The rest is left to `complete`.
        """

    @abstractmethod
    def end_study(self, summary: Mapping[str, Any], report: Path | None) -> None:
        """Write the results into the run of the study itself, where the tracker has one.

        Args:
            summary: the content of `summary.json`.
            report: `report.html`; None: there is none yet.
        """


def results_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a study's summary that its own run has."""
    names = ("best_value", "best_trial", "n_complete", "n_pruned", "n_failed", "majority_baseline", "wall_seconds")
    found = {name: summary.get(name) for name in names}
    found |= {f"test/{name}": value for name, value in (summary.get("test") or {}).items()}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
