"""A tracker that keeps its runs in memory, and can be away."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from lightning_bge.hpo.trackers.record import StudyRecord, TrialRecord
from lightning_bge.hpo.trackers.tracker import Known, Tracker, TrialRun

STUDY = StudyRecord("k", "study", "f1", Path("run"))


class MemoryLogger(Logger):
    """Keeps the points of a run."""

    name = version = "memory"

    def __init__(self) -> None:
        self.points: dict[str, dict[int, float]] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Each point once."""
        for name, value in metrics.items():
            assert step not in self.points.get(name, {})
            self.points.setdefault(name, {})[step or 0] = value


class MemoryRun(TrialRun):
    """A run."""

    logger: MemoryLogger
    state: str | None = None
    record: TrialRecord

    def end(self, record: TrialRecord) -> None:
        """The rest of the points, and the state."""
        self.log(record)
        self.state, self.record = record.state, record


class MemoryTracker(Tracker):
    """Has its runs in `runs`, by their keys.

    Attributes:
        away: called at each use: it may raise an error, or wait.
        begun: how many runs were created.
    """

    name = "memory"

    def __init__(self, away: Callable[[], object] = lambda: None) -> None:
        super().__init__({}, STUDY)
        self.away, self.runs, self.begun = away, {}, 0
        self.results: list[tuple[Mapping[str, Any], Path | None]] = []
        self.runs: dict[str, MemoryRun]

    def open(self) -> None:
        """Nothing."""
        self.away()

    def begin(self, record: TrialRecord) -> MemoryRun:
        """A run in memory."""
        self.away()
        assert record.key not in self.runs
        self.begun += 1
        run = self.runs[record.key] = MemoryRun(record.key, MemoryLogger())
        return run

    def known(self) -> dict[str, Known]:
        """The runs."""
        self.away()
        return {key: Known(run.state, sum(map(len, run.logger.points.values()))) for key, run in self.runs.items()}

    def complete(self, record: TrialRecord) -> None:
        """Add what is missing."""
        (self.runs.get(record.key) or self.begin(record)).end(record)

    def end_lost(self, record: TrialRecord) -> None:
        """Set the state of a run that is there."""
        self.away()
        if record.key in self.runs:
            self.runs[record.key].state = record.state

    def end_study(self, summary: Mapping[str, Any], report: Path | None) -> None:
        """Keep the results."""
        self.away()
        self.results.append((summary, report))
