"""What a study's history says of its hours: those of the search, when it became better, and those that were saved."""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate

from lightning_bge.hpo.analysis.history import History, PastTrial


class SearchClock:
    """Hours of a search at a point in time: those in which at least one trial was running, up to then.

    So pauses between calls do not count, and of trials that run side by side each hour counts once.

    Args:
        history: the study.
    """

    def __init__(self, history: History) -> None:
        self.spans: list[tuple[datetime, datetime]] = []
        for start, end in sorted(
            (trial.start, trial.end or history.read)
            for trial in history.trials
            if trial.start is not None and (trial.end is not None or trial.outcome == "running")
        ):
            if self.spans and start <= self.spans[-1][1]:
                self.spans[-1] = (self.spans[-1][0], max(end, self.spans[-1][1]))
            else:
                self.spans.append((start, end))
        # seconds before each of them, and in all
        self.before = [0.0, *accumulate((end - start).total_seconds() for start, end in self.spans)]

    def hours(self, moment: datetime | None = None) -> float:
        """Hours up to then; None: all."""
        if moment is None:
            return self.before[-1] / 3600
        last = bisect(self.spans, moment, key=lambda span: span[0]) - 1
        if last < 0:
            return 0.0
        start, end = self.spans[last]
        return (self.before[last] + (min(moment, end) - start).total_seconds()) / 3600


def best_over_hours(history: History) -> list[tuple[float, PastTrial]]:
    """The trials that were the best so far when they ended, and after how many hours of the search that was."""
    clock = SearchClock(history)
    found: list[tuple[float, PastTrial]] = []
    for end, trial in sorted(((trial.end, trial) for trial in history.ranked if trial.end), key=lambda one: one[0]):
        if not found or history.rank(trial) < history.rank(found[-1][1]):
            found.append((clock.hours(end), trial))
    return found


@dataclass(frozen=True)
class Savings:
    """What ending trials early has saved.

    Attributes:
        spent: hours of all trials that have ended, of several at once each counted.
        saved: hours that the trials that were pruned, or paused and not resumed, would have taken further: for each the
            reports that it did not make, times its own mean seconds a report so far. An estimate: folds that would
            have stopped early by themselves are not known.
        trials: how many were ended early, and are in it.
        unknown: how many more are not, as their seconds are not recorded.
    """

    spent: float
    saved: float
    trials: int
    unknown: int


def hours_saved(history: History) -> Savings:
    """What ending trials early has saved so far."""
    ended = [trial for trial in history.trials if trial.start is not None and trial.end is not None]
    spent = sum((trial.end - trial.start).total_seconds() for trial in ended if trial.end and trial.start)
    early = [trial for trial in history.trials if trial.outcome in ("paused", "pruned")]
    known = [trial for trial in early if trial.last_report and trial.curve_seconds]
    saved = sum((history.steps.total - trial.last_report) * trial.curve_seconds / trial.last_report for trial in known)
    return Savings(spent / 3600, saved / 3600, len(known), len(early) - len(known))
