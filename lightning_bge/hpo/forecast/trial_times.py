"""What the trials of a running search have taken, and what further ones are expected to take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.steps import Report, Steps
from lightning_bge.hpo.trials import REPORTS_BEFORE, WORKER

DRIFT = 0.03  # standard deviation of a machine's speed in the rest over that so far
FIRST_SPREAD = 0.3  # standard error of the mean, as a share of it, where a single trial has ended
REFIT = 0.8  # of the epochs: the refit trains as many as the folds' best epochs were on average


@dataclass(frozen=True)
class TrialTime:
    """What a trial that has ended took.

    Attributes:
        seconds: from its start to its end.
        inside: the part of them in its steps, with what a fold's start takes.
        train: the part of that without validations.
        steps: that it made, without those of the trial that it resumes.
        start: how many that one had made.
    """

    seconds: float
    inside: float
    train: float
    steps: int
    start: int

    @property
    def end(self) -> int:
        """The last step."""
        return self.start + self.steps


@dataclass(frozen=True)
class TrialTimes:
    """What the trials so far took.

    Attributes:
        trials: by the trials' numbers.
        gap: seconds between the end of a worker's trial and the start of its next one.
    """

    trials: dict[int, TrialTime]
    gap: float

    @classmethod
    def read(cls, trials: Sequence[FrozenTrial], steps: Steps) -> TrialTimes | None:
        """Read the times of all trials of a study; None: no trial that reported has ended yet.

        A worker's first trial is left out where it has run several, as it contains what a process does once.
        """
        by_worker = _by_worker(trials)
        first = {mine[0].number for mine in by_worker.values() if len(mine) > 2}
        times = {trial.number: time for trial in trials if (time := _trial_time(trial, steps)) is not None}
        if not times:
            return None
        return cls({number: time for number, time in times.items() if number not in first} or times, _gap(by_worker))

    @cached_property
    def _step(self) -> float:
        """Mean seconds of a step."""
        times = self.trials.values()
        return math.fsum(time.inside for time in times) / sum(time.steps for time in times)

    @cached_property
    def _outside(self) -> float:
        """Mean seconds of a trial outside of its steps."""
        return statistics.fmean(time.seconds - time.inside for time in self.trials.values())

    @cached_property
    def _by_steps(self) -> dict[tuple[float, float], list[float]]:
        found: dict[tuple[float, float], list[float]] = {}
        for time in self.trials.values():
            found.setdefault((time.start, time.end), []).append(time.seconds)
        return found

    @cached_property
    def ratios(self) -> dict[int, float]:
        """Each trial's seconds over what is expected of it, by the trials' numbers; 1 on average."""
        expected = {number: self.seconds(time.start, time.end) for number, time in self.trials.items()}
        found = {number: time.seconds / expected[number] for number, time in self.trials.items()}
        mean = statistics.fmean(found.values())
        return {number: ratio / mean for number, ratio in found.items()}

    def seconds(self, start: int, end: float) -> float:
        """What a trial between these steps is expected to take; trials between the same ones count most."""
        same = self._by_steps.get((start, end), [])
        return (math.fsum(same) + self._outside + self._step * (end - start)) / (len(same) + 1)

    def refit_seconds(self, steps: Steps) -> float:
        """What the refit is expected to take: of K folds K / (K - 1) times a fold's rows, without a validation."""
        times = self.trials.values()
        step = math.fsum(time.train for time in times) / sum(time.steps for time in times)
        rows = steps.folds / (steps.folds - 1) if steps.folds > 1 else 1.25
        return step * steps.per_epoch * rows * refit_epochs(steps.epochs)

    def factor(self, random: np.random.Generator) -> float:
        """How much slower than expected the rest is, drawn at random: an error of the mean, and the machine's."""
        count = len(self.ratios)
        error = FIRST_SPREAD if count == 1 else statistics.stdev(self.ratios.values()) / math.sqrt(count)
        off = np.clip(random.standard_t(max(1, count - 1)), -4, 4)  # few trials hardly determine their spread
        return max(0.2, 1 + error * float(off) + DRIFT * float(random.standard_normal()))

    def spread(self, random: np.random.Generator, count: int) -> np.ndarray:
        """How much slower than expected each of so many trials is, drawn at random from those so far."""
        return random.choice(list(self.ratios.values()), size=count)


def refit_epochs(epochs: int) -> float:
    """How many epochs the refit trains on average, from a fold's epochs."""
    return max(1.0, REFIT * epochs)


def _trial_time(trial: FrozenTrial, steps: Steps) -> TrialTime | None:
    """None: it has not ended, or made no step."""
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED) or trial.duration is None:
        return None
    start = trial.user_attrs.get(REPORTS_BEFORE, 0)
    # where there is a cost as well, Optuna takes no reports
    made = (steps.total if trial.state == TrialState.COMPLETE else len(trial.intermediate_values)) - start
    if made < 1:
        return None
    seconds = trial.duration.total_seconds()
    curve = [Report(*report) for fold in trial.user_attrs.get("curve", ()) for report in fold]
    own = [report for report in curve if report.step > start]
    train = math.fsum(report.train_seconds for report in own) if curve else seconds
    inside = train + math.fsum(report.val_seconds for report in own)
    return TrialTime(seconds, min(inside, seconds), min(train, seconds), made, start)


def _by_worker(trials: Sequence[FrozenTrial]) -> dict[str, list[FrozenTrial]]:
    """The ended trials of each process, in their order; those that name one."""
    found: dict[str, list[FrozenTrial]] = {}
    for trial in trials:
        worker = trial.user_attrs.get(WORKER)
        if worker and trial.datetime_start and trial.datetime_complete:
            found.setdefault(worker["id"], []).append(trial)
    return found


def _gap(by_worker: dict[str, list[FrozenTrial]]) -> float:
    """Median seconds between a process's trials; 0 where it is not known who ran them."""
    gaps = [
        (after.datetime_start - before.datetime_complete).total_seconds()  # type: ignore[operator]
        for mine in by_worker.values()
        for before, after in pairwise(mine)
    ]
    return max(0.0, statistics.median(gaps)) if gaps else 0.0
