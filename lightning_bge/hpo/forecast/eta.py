"""When a running search will be done: from what its trials have really taken, and what is still to come.

What a trial takes is known from those that have ended. How many reports there will be is not: a pruner decides that on
the way. So the rest of the search is run forward many times (`hpo.simulate`) from where it stands: with `asha` from
the real standings, where a new trial stands anywhere among those before it; with other pruners by what they do on
simulated curves, scaled to what they have done so far.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, insort
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.config import BEST
from lightning_bge.hpo.forecast.preview import simulated_reports
from lightning_bge.hpo.forecast.simulator import STARTUP, Halving, Prices, Promoted, Running, schedule, skill
from lightning_bge.hpo.pruning.asha import (
    RESUMES,
    any_complete,
    ended_parameter_sets,
    latest_trials,
    not_resumable,
    parameter_set_of,
)
from lightning_bge.hpo.pruning.config import PrunerConfig, rungs, startup_trials
from lightning_bge.hpo.steps import Report, Steps
from lightning_bge.hpo.storage.workers import death_of

RUNS = 100  # of the rest of the search
MOST_TRIALS = 40_000  # of all runs together: about a second
DRIFT = 0.03  # standard deviation of a machine's speed in the rest over that so far
FIRST_SPREAD = 0.3  # standard error of the mean, as a share of it, where a single trial has ended
LAST_PLACES = 30  # of these trials tell where the next ones will stand
REFIT = 0.8  # of the epochs: the refit trains as many as the folds' best epochs were on average
UNKNOWN = 20  # as if so many trials had stood anywhere, or been pruned as simulated: what was seen has to outweigh them


@dataclass(frozen=True)
class Eta:
    """Seconds until a search is done; in eight searches of ten it is between `low` and `high`."""

    low: float
    mid: float
    high: float


def estimate_end(
    trials: Sequence[FrozenTrial],
    pruner: PrunerConfig,
    n_trials: int,
    steps: Steps,
    workers: int,
    now: datetime,
    direction: Literal["maximize", "minimize"] = "maximize",
    sampler: Literal["tpe", "random"] = "tpe",
    seeds: int = 0,
    replicated: int = 0,
    refit: bool = False,
) -> Eta | None:
    """Seconds until all trials of a search are finished, with the range that holds in eight searches of ten.

    Args:
        trials: all of the study, in their order, running and waiting ones too. What they took is the time from start to
            end; the user attribute `curve` tells what of it was training and validation. One that runs in a process
            that is gone counts as failed.
        pruner: of the search.
        n_trials: how many are to be finished.
        steps: what a trial that runs to its end reports.
        workers: processes that are at it now.
        now: local time without a time zone, as Optuna's times are.
        direction: of the score.
        sampler: of the search; with tpe the later points are better, and with `asha` more of them go on.
        seeds: further ones, with which the best of the trials that run to their end are run again.
        replicated: those of these runs that have ended.
        refit: whether a model is trained on all rows at the end.

    Returns:
        None where no trial has ended yet, so that there is nothing to go by.
    """
    trials = [_failed(one) if _is_dead(one) else one for one in trials]
    ran = _ran(trials)
    once = {mine[0].number for mine in ran.values() if len(mine) > 2}  # what a process does once is in its first trial
    visits = {trial.number: visit for trial in trials if (visit := _visit(trial, trials, steps)) is not None}
    if not visits:
        return None
    spent = _Spent({number: visit for number, visit in visits.items() if number not in once} or visits, _gap(ran))
    left = n_trials - ended_parameter_sets(trials)
    runs = max(20, min(RUNS, MOST_TRIALS // max(1, left)))
    random = np.random.default_rng(len(trials))
    if pruner.name == "asha":
        sign = 1.0 if direction == "maximize" else -1.0
        rest = _Promoted(trials, pruner, n_trials, steps, sign, spent, now, sampler == "tpe")
        found = [rest.run(random, workers) for _ in range(runs)]
    else:
        found = _pruned(trials, pruner, n_trials, steps, spent, now, random, runs, workers)
    again = max(0, seeds * _best(trials, pruner, n_trials, steps) - replicated)
    after = again / workers * spent.seconds(0, steps.total) + refit * spent.refit(steps)
    low, mid, high = np.quantile(np.array(found) + after, [0.1, 0.5, 0.9])
    return Eta(float(low), float(mid), float(high))


def being_run(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The running trials whose processes are not known to be gone."""
    return [trial for trial in trials if trial.state == TrialState.RUNNING and not _is_dead(trial)]


def refit_epochs(epochs: int) -> float:
    """That the refit trains on average, of a fold's epochs."""
    return max(1.0, REFIT * epochs)


def _is_dead(trial: FrozenTrial) -> bool:
    """Whether a running trial's process is known to be gone."""
    return trial.state == TrialState.RUNNING and "worker" in trial.user_attrs and death_of(trial) is not None


def _failed(trial: FrozenTrial) -> FrozenTrial:
    found = copy(trial)
    found.state = TrialState.FAIL
    return found


def _best(trials: Sequence[FrozenTrial], pruner: PrunerConfig, n_trials: int, steps: Steps) -> int:
    """How many trials will be run again: of those that run to their end the best, and with `asha` there are few."""
    complete = sum(trial.state == TrialState.COMPLETE for trial in trials)
    if ended_parameter_sets(trials) < n_trials:
        [at] = rungs(pruner, steps) if pruner.name == "asha" else [()]
        complete = max(1, complete, round(n_trials / pruner.reduction_factor ** len(at)))
    return min(BEST, complete)


# ---------------------------------------------------------------------- what was spent


@dataclass(frozen=True)
class _Visit:
    """A trial that has ended: one stretch of training.

    Attributes:
        seconds: that it took.
        inside: the part of them in its reports, with what a fold's start takes.
        train: the part of that without validations.
        reports: that it made, without those of the trial that it goes on with.
        start: how many that one had made.
    """

    seconds: float
    inside: float
    train: float
    reports: int
    start: int


@dataclass(frozen=True)
class _Spent:
    """What the trials so far took.

    Attributes:
        visits: by the trials' numbers.
        gap: seconds between the end of a worker's trial and the start of its next one.
    """

    visits: dict[int, _Visit]
    gap: float

    @cached_property
    def _report(self) -> float:
        """Mean seconds of a report."""
        visits = self.visits.values()
        return math.fsum(visit.inside for visit in visits) / sum(visit.reports for visit in visits)

    @cached_property
    def _outside(self) -> float:
        """Mean seconds of a visit outside of its reports."""
        return statistics.fmean(visit.seconds - visit.inside for visit in self.visits.values())

    @cached_property
    def _like(self) -> dict[tuple[float, float], list[float]]:
        found: dict[tuple[float, float], list[float]] = {}
        for visit in self.visits.values():
            found.setdefault((visit.start, visit.start + visit.reports), []).append(visit.seconds)
        return found

    @cached_property
    def ratios(self) -> dict[int, float]:
        """Each visit's seconds over what is expected of it, by the trials' numbers; 1 on average."""
        expected = {n: self.seconds(visit.start, visit.start + visit.reports) for n, visit in self.visits.items()}
        found = {number: visit.seconds / expected[number] for number, visit in self.visits.items()}
        mean = statistics.fmean(found.values())
        return {number: ratio / mean for number, ratio in found.items()}

    def refit(self, steps: Steps) -> float:
        """What the refit takes: of K folds K / (K - 1) times a fold's rows, without a validation."""
        visits = self.visits.values()
        report = math.fsum(visit.train for visit in visits) / sum(visit.reports for visit in visits)
        rows = steps.folds / (steps.folds - 1) if steps.folds > 1 else 1.25
        return report * steps.per_epoch * rows * refit_epochs(steps.epochs)

    def seconds(self, start: int, end: float) -> float:
        """What a visit between these reports is expected to take; those between the same ones count most."""
        like = self._like.get((start, end), [])
        return (math.fsum(like) + self._outside + self._report * (end - start)) / (len(like) + 1)

    def factor(self, random: np.random.Generator) -> float:
        """How much slower than expected the rest is, drawn at random: an error of the mean, and the machine's."""
        count = len(self.ratios)
        error = FIRST_SPREAD if count == 1 else statistics.stdev(self.ratios.values()) / math.sqrt(count)
        off = np.clip(random.standard_t(max(1, count - 1)), -4, 4)  # few trials tell little of their spread
        return max(0.2, 1 + error * float(off) + DRIFT * float(random.standard_normal()))

    def spread(self, random: np.random.Generator, count: int) -> np.ndarray:
        """How much slower than expected each of so many trials is."""
        return random.choice(list(self.ratios.values()), size=count)


def _visit(trial: FrozenTrial, trials: Sequence[FrozenTrial], steps: Steps) -> _Visit | None:
    """None: it has not ended, or made no report."""
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED) or trial.duration is None:
        return None
    paused = trial.user_attrs.get(RESUMES)
    start = 0 if paused is None else len(trials[paused].intermediate_values)
    # where there is a cost as well, Optuna takes no reports
    reports = (steps.total if trial.state == TrialState.COMPLETE else len(trial.intermediate_values)) - start
    if reports < 1:
        return None
    seconds = trial.duration.total_seconds()
    curve = [Report(*report) for fold in trial.user_attrs.get("curve", ()) for report in fold]
    made = [report for report in curve if report.step > start]
    train = math.fsum(report.train_seconds for report in made) if curve else seconds
    inside = train + math.fsum(report.val_seconds for report in made)
    return _Visit(seconds, min(inside, seconds), min(train, seconds), reports, start)


def _ran(trials: Sequence[FrozenTrial]) -> dict[tuple[str, int], list[FrozenTrial]]:
    """The trials that each process has run, in their order; those that `mark_alive` has marked."""
    ran: dict[tuple[str, int], list[FrozenTrial]] = {}
    for trial in trials:
        worker = trial.user_attrs.get("worker")
        if worker and trial.datetime_start and trial.datetime_complete:
            ran.setdefault((worker["host"], worker["pid"]), []).append(trial)
    return ran


def _gap(ran: dict[tuple[str, int], list[FrozenTrial]]) -> float:
    """Median seconds between a process's trials; 0 where it is not known who ran them."""
    gaps = [
        (after.datetime_start - before.datetime_complete).total_seconds()  # type: ignore[operator]
        for mine in ran.values()
        for before, after in pairwise(mine)
    ]
    return max(0.0, statistics.median(gaps)) if gaps else 0.0


def _elapsed(trial: FrozenTrial, now: datetime) -> float:
    return max(0.0, (now - trial.datetime_start).total_seconds()) if trial.datetime_start else 0.0


# ---------------------------------------------------------------------- what is to come


class _Promoted:
    """The rest of a search with `asha`: its standings now, to be run forward many times."""

    def __init__(
        self,
        trials: Sequence[FrozenTrial],
        pruner: PrunerConfig,
        n_trials: int,
        steps: Steps,
        sign: float,
        spent: _Spent,
        now: datetime,
        learns: bool,
    ) -> None:
        [at] = rungs(pruner, steps)
        self.learns = learns
        self.spent, self.ended, self.left = (
            spent,
            ended_parameter_sets(trials),
            max(0, n_trials - ended_parameter_sets(trials)),
        )
        self.stages = [spent.seconds(start, end) for start, end in pairwise([0, *at, steps.total])]
        self.halving = Halving(len(at), pruner.reduction_factor, n_trials)
        self.halving.complete = any_complete(trials)
        self.running: list[Running] = []  # `at` is how long ago it was begun
        self.places: list[float] = []  # at the first rung, 0 to 1: where each point stood among those before it
        # one that waits to be resumed stands there as a paused one
        known = {
            point: one
            for point, one in latest_trials(trials).items()
            if one.state != TrialState.WAITING or RESUMES in one.user_attrs
        }
        busy = not_resumable(trials) - {point for point, one in known.items() if one.state == TrialState.WAITING}
        self.known = len(known)
        self.own: dict[int, float] = {}  # how much slower than others the known points are
        self.reached: dict[int, float] = {}  # the known points' values at the last rung that they reached
        self.before: list[list[float]] = [[] for _ in at]  # at the rung before, of those at each rung; lower is better
        values = _values(trials, at, sign)
        random = np.random.default_rng(0)
        for number, (point, one) in enumerate(sorted(known.items())):
            there = values.get(point, {})
            for rung, value in there.items():
                if rung:
                    insort(self.before[rung], -there[rung - 1])
                self.reached[number] = value
                can = point not in busy and rung == max(there)
                place = self.halving.arrive(number, rung, value, can)
                if rung == 0 and len(self.halving.ranked[0]) > 1:
                    self.places.append((place + random.random()) / len(self.halving.ranked[0]))
            if one.number in spent.ratios:
                self.own[number] = spent.ratios[one.number]
            if one.state == TrialState.RUNNING:
                first = RESUMES not in one.user_attrs
                self.running.append(Running(_elapsed(one, now), number, len(there), first))

    def run(self, random: np.random.Generator, workers: int) -> float:
        """Seconds that it takes."""
        halving, count = self.halving.copy(), self.known + self.left + workers
        spread = self.spent.spread(random, count)
        spread[list(self.own)] = list(self.own.values())
        costs = np.outer(spread * self.spent.factor(random), self.stages)
        nothing = np.zeros_like(costs)
        prices = Prices(np.full(count, self.spent.gap), costs, nothing, nothing)
        running = [
            Running(max(0.0, costs[point, 0 if first else stage : stage + 1].sum() - elapsed), point, stage, first)
            for elapsed, point, stage, first in self.running
        ]
        stages = len(self.stages)
        rest = Promoted(halving, tuple(range(1, stages)), stages, self.ended, self.known, running)

        value = _Values(self, halving, random)
        return rest.run(value, prices, workers).wall


class _Values:
    """Values of the points that get to a rung, drawn at random in one run.

    At the first rung a new point stands as one of the last ones did, as far as they tell, or anywhere: a Bayesian
    bootstrap. At a later one it stands where it would by its value at the rung before, or anywhere; how often which is
    drawn for each run, as little is known of it.
    """

    def __init__(self, rest: _Promoted, halving: Halving, random: np.random.Generator) -> None:
        self.halving, self.random = halving, random
        self.before = [list(rung) for rung in rest.before]
        self.known = dict(rest.reached)
        self.last = rest.places[-LAST_PLACES:]
        self.bounds = random.dirichlet([1.0] * len(self.last) + [UNKNOWN]).cumsum()
        self.agree = random.random()
        self.power = skill(random) if rest.learns else 1.0

    def __call__(self, point: int, rung: int) -> float:
        """The point's value at the rung, higher is better."""
        drawn, place = self.random.random(), self.random.random()
        if rung == 0:
            number = int(self.bounds.searchsorted(drawn))
            place = self.last[number] if number < len(self.last) else place ** (self.power if point >= STARTUP else 1.0)
        else:
            others, mine = self.before[rung], -self.known[point]
            if drawn < self.agree:
                place = (bisect_left(others, mine) + place) / (len(others) + 1)
            insort(others, mine)
        found = -_between(self.halving.ranked[rung], place, self.random.random())
        self.known[point] = found
        return found


def _values(trials: Sequence[FrozenTrial], at: Sequence[int], sign: float) -> dict[int, dict[int, float]]:
    """What each point has at each rung that it has reached, higher is better."""
    found: dict[int, dict[int, float]] = {}
    for trial in trials:
        if trial.state != TrialState.FAIL:
            reported = trial.intermediate_values
            there = {rung: sign * reported[step] for rung, step in enumerate(at) if step in reported}
            found.setdefault(parameter_set_of(trial), {}).update(there)
    return found


def _between(ranked: Sequence[tuple[float, int]], place: float, part: float) -> float:
    """A value at this place (0 to 1) among ascending ones, in the gap there or beyond their ends."""
    if not ranked:
        return 0.0
    number = min(int(place * (len(ranked) + 1)), len(ranked))
    low = ranked[number - 1][0] if number else ranked[0][0] - 1
    high = ranked[number][0] if number < len(ranked) else ranked[-1][0] + 1
    return low + part * (high - low)


def _pruned(
    trials: Sequence[FrozenTrial],
    pruner: PrunerConfig,
    n_trials: int,
    steps: Steps,
    spent: _Spent,
    now: datetime,
    random: np.random.Generator,
    runs: int,
    workers: int,
) -> list[float]:
    """Seconds that the rest takes with a pruner that ends trials for good, or without one; several runs."""
    simulated = simulated_reports(pruner, n_trials, steps)
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    free, done = startup_trials(pruner, n_trials), min(len(ended), n_trials)
    made = sum(len(trial.intermediate_values) for trial in ended[free:])
    found = []
    for _ in range(runs):
        reports = random.choice(simulated)
        assumed = UNKNOWN * reports[free:].mean() if free < n_trials else 1.0
        ratio = (made + assumed) / (reports[free:done].sum() + assumed)
        rest = np.minimum(reports[done:] * np.where(np.arange(done, n_trials) < free, 1.0, ratio), steps.total)
        seconds = np.array([spent.seconds(0, count) for count in rest.tolist()]) + spent.gap
        seconds *= spent.spread(random, len(rest)) * spent.factor(random)
        for number, trial in enumerate(running[: len(rest)]):
            seconds[number] = max(0.0, seconds[number] - _elapsed(trial, now))
        found.append(schedule(seconds.tolist(), workers))
    return found
