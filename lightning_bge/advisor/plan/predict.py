"""A study's hours, with a range: what its trials take, times how far a pruner lets them go, run forward many times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np

from lightning_bge.advisor.plan.calibrate import Calibration
from lightning_bge.advisor.plan.cost_model import TrialCost
from lightning_bge.hpo.analysis.history import History
from lightning_bge.hpo.config import BEST
from lightning_bge.hpo.forecast.preview import SIMULATED, STYLES, sample_curves
from lightning_bge.hpo.forecast.recording import Curve, Recording
from lightning_bge.hpo.forecast.replay import policy_of
from lightning_bge.hpo.forecast.simulator import STARTUP, Durations, Outcome, schedule, simulate_asha, skill
from lightning_bge.hpo.forecast.trial_times import refit_epochs
from lightning_bge.hpo.pruning.config import PrunerConfig, rungs
from lightning_bge.hpo.pruning.halving import Halving
from lightning_bge.hpo.space.search_space import Space
from lightning_bge.hpo.steps import Steps

RUNS = 80
FEW = 12  # runs with a pruner of Optuna's, each of which takes up to half a second
CURVES = 150  # simulated ones to choose from, of each style
# Standard deviation of a machine's speed over the hours of a study against that of the minute in which it was measured:
# what plans missed by, given the reports that were made (docs/benchmarks/plan_accuracy.md). Machines differ in it.
DRIFT = 0.06


@dataclass(frozen=True)
class Study:
    """What decides a study's hours, besides what its trials take.

    Attributes:
        trials: how many.
        steps: what a trial that runs to its end reports.
        pruner: of the search.
        workers: processes that share it, each on a device of its own.
        seeds: further ones, with which the best of the trials that ran to their end (`hpo.BEST`, or as many as there
            are) run once more.
        refit: whether a model is trained on all rows at the end.
        learns: whether the sampler is one that learns (tpe).
        patience: epochs without a better value after which a fold ends.
        survival: the share of the full cost that the pruner leaves, where it is known; None: it is simulated.
        curves: recorded learning curves; None: simulated ones.
        compile_s: seconds that each worker compiles, or tries to.
    """

    trials: int
    steps: Steps
    pruner: PrunerConfig
    workers: int = 1
    seeds: int = 0
    refit: bool = True
    learns: bool = True
    patience: int | None = None
    survival: float | None = None
    curves: Recording | None = None
    compile_s: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """Seconds of a study; in eight of ten it takes between `low` and `high`.

    Attributes:
        low: by the clock on the wall.
        mid: likewise.
        high: likewise.
        full: of all trials without pruning, on one worker, besides the study's start and end.
        search: of the trials as they are pruned, all workers together.
        around: of start and end, and what is done once; by the clock on the wall.
        seed_replicates: by the clock on the wall.
        share: `search` over `full`: low, mid, high.
        complete: trials that run to their end.
    """

    low: float
    mid: float
    high: float
    full: float
    search: float
    around: float
    seed_replicates: float
    share: tuple[float, float, float]
    complete: float


@dataclass(frozen=True)
class Priced:
    """What each of M points of the space takes, in seconds.

    Attributes:
        costs: their parts.
        first: the first so many are tried first, in this order; of the others each trial is one at random.
    """

    costs: Sequence[TrialCost]
    first: int = 0

    @classmethod
    def of(
        cls, calibration: Calibration, points: Sequence[dict[str, Any]], space: Space, epochs: int, first: int
    ) -> Priced:
        """As the calibration has it."""
        return cls([calibration.cost(point, space, epochs) for point in points], first)

    def column(self, name: str) -> np.ndarray:
        """One part of all points, [M]."""
        return np.array([getattr(cost, name) for cost in self.costs], dtype=float)

    def scaled(self, train: float, validation: float) -> Priced:
        """With other numbers of rows, as shares of those now."""
        scaled = [replace(c, train=c.train * train, validation=c.validation * validation) for c in self.costs]
        return Priced(scaled, self.first)

    def prices(self, steps: Steps, at: Sequence[int], chosen: np.ndarray, trained: np.ndarray) -> Durations:
        """Of chosen points, [N], with what early stopping leaves of their folds, bool [N, R]."""
        within = np.arange(steps.total) % steps.per_fold
        runs = within < self.column("epochs")[:, None] * steps.per_epoch
        part = (self.column("train") + self.column("epoch")) / steps.per_epoch + self.column("validation")
        fold = self.column("fold")
        reports = (part[:, None] * runs)[chosen] * trained + (fold[:, None] * (within == 0))[chosen]
        # at a fold's last report nothing has to be kept of it, and no fold is begun again
        inside = np.array([step % steps.per_fold > 0 for step in at], dtype=float)
        pause, resume = self.column("pause")[chosen], (self.column("resume") + fold)[chosen]
        return Durations(self.column("visit")[chosen], reports, np.outer(pause, inside), np.outer(resume, inside))

    def full(self, steps: Steps) -> float:
        """Mean seconds of a trial that runs to its end."""
        return fmean(cost.total(steps) for cost in self.costs)


# ---------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Pool:
    """Learning curves to choose from, the best end first.

    Attributes:
        values: [C, R], higher is better.
        trained: bool [C, R], which reports early stopping leaves.
        style: their name.
    """

    values: np.ndarray
    trained: np.ndarray
    style: str


def pools(study: Study) -> list[Pool]:
    """The recorded curves, or simulated ones of each style."""
    if study.curves is not None:
        return [_pool(study.curves, study)]
    count = max(20, min(CURVES, 60_000 // study.steps.total))
    return [_pool(sample_curves(count, study.steps, seed, style), study) for seed in (0, 1) for style in STYLES]


def _pool(recording: Recording, study: Study) -> Pool:
    steps = study.steps
    # curves of another length are stretched: what counts is who stands above whom at which part of the whole
    at = np.ceil(np.arange(1, steps.total + 1) * recording.n_steps / steps.total).astype(int) - 1
    whole = [curve for curve in recording.trials if len(curve.values) == recording.n_steps]
    values = recording.sign * np.array([curve.values for curve in whole])[:, at]
    values = values[np.argsort(-values[:, -1], kind="stable")]
    return Pool(values, _trained(values, steps, study.patience), recording.name)


def _trained(values: np.ndarray, steps: Steps, patience: int | None) -> np.ndarray:
    """Which reports are trained for, where a fold ends after so many epochs without a better value."""
    found = np.ones(values.shape, dtype=bool)
    if patience is None:
        return found
    ends = np.zeros(len(values))  # the sum of the folds so far
    for fold in range(steps.folds):
        first = fold * steps.per_fold
        # the best of the fold so far, as its part of the mean over the folds
        best = values[:, first : first + steps.per_fold] * (fold + 1) - ends[:, None]
        whole = best[:, steps.per_epoch - 1 :: steps.per_epoch]
        since = np.zeros(len(values), dtype=int)
        stopped = np.full(len(values), steps.epochs)
        for epoch in range(1, steps.epochs):
            since = np.where(whole[:, epoch] > whole[:, epoch - 1] + 1e-9, 0, since + 1)
            stopped = np.where((since >= patience) & (stopped == steps.epochs), epoch + 1, stopped)
        within = np.arange(steps.per_fold) // steps.per_epoch
        found[:, first : first + steps.per_fold] = within < stopped[:, None]
        ends = ends + best[:, -1]
    return found


# ---------------------------------------------------------------------- running it forward


def predict(study: Study, priced: Priced, calibration: Calibration, runs: int = RUNS, seed: int = 0) -> Prediction:
    """Hours of a study.

    Drawn anew in each run are the trials' settings, their learning curves and order, how much a sampler learns, the
    error of what was measured, and the machine's speed.

    Args:
        study: what is asked.
        priced: what its points take.
        calibration: what surrounds the trials, and how well it is known.
        runs: how many; fewer with pruners of Optuna's, which are asked themselves.
        seed: of all random numbers.
    """
    random = np.random.default_rng(seed)
    curves = pools(study)
    if study.pruner.name not in ("asha", "none") and study.survival is None:
        runs = min(runs, FEW)
    walls, shares, found, seed_replicates = [], [], [], []
    full = priced.full(study.steps)
    around = calibration.start + calibration.first + calibration.finish + study.compile_s
    around += calibration.refit_epoch * study.refit * refit_epochs(study.steps.epochs)
    for number in range(runs):
        run = _Run(study, priced, curves[number % len(curves)], random).outcome
        pace = max(0.3, (1 + calibration.error * random.standard_normal()) * (1 + DRIFT * random.standard_normal()))
        found.append(run)
        again = min(BEST, run.complete(study.steps.total)) * study.seeds
        seed_replicates.append(full * math.ceil(again / study.workers) + calibration.read * (again > 0))
        walls.append((run.wall + around + seed_replicates[-1]) * pace)
        shares.append(run.seconds / (full * study.trials))
    low, mid, high = (float(value) for value in np.quantile(walls, [0.1, 0.5, 0.9]))
    return Prediction(
        *(low, mid, high, full * study.trials),
        search=fmean(run.seconds for run in found),
        around=around,
        seed_replicates=fmean(seed_replicates),
        share=tuple(float(value) for value in np.quantile(shares, [0.1, 0.5, 0.9])),  # type: ignore[arg-type]
        complete=fmean(run.complete(study.steps.total) for run in found),
    )


@dataclass(frozen=True)
class _Run:
    """One study, its trials and curves drawn at random."""

    study: Study
    priced: Priced
    pool: Pool
    random: np.random.Generator

    @cached_property
    def outcome(self) -> Outcome:
        """How it went."""
        study, steps = self.study, self.study.steps
        count = study.trials + study.workers
        first = min(self.priced.first, count)
        others = self.random.integers(self.priced.first, len(self.priced.costs), count - first)
        chosen = np.concatenate([np.arange(first), others]) if first < count else np.arange(first)
        place = self._places(count)
        trained = self.pool.trained[place]
        at: Sequence[int] = rungs(study.pruner, steps)[0] if study.pruner.name == "asha" else ()
        prices = self.priced.prices(steps, at, chosen, trained)
        if study.survival is not None:
            return self._all(prices, np.full(study.trials, steps.total), study.survival)
        if study.pruner.name == "none":
            return self._all(prices, np.full(study.trials, steps.total))
        values = self.pool.values[place]
        # curves drawn twice would be equals
        values = values + self.random.normal(0, 1e-3 * (float(values.std()) + 1e-9), (count, 1))
        if study.pruner.name == "asha":
            return simulate_asha(at, study.pruner.reduction_factor, study.trials, values, prices, study.workers)
        return self._all(prices, self._judged(values))

    def _places(self, count: int) -> np.ndarray:
        """Which of the curves each trial has: with a sampler that learns better ones, once it has begun to."""
        drawn = self.random.random(count)
        if self.study.learns:
            drawn[STARTUP:] **= skill(self.random)
        return (drawn * len(self.pool.values)).astype(int)

    def _judged(self, values: np.ndarray) -> np.ndarray:
        """Reports of each trial under a pruner that ends trials for good, which is asked itself; of many trials the
        later ones make as many as those of the second half of the first ones."""
        study, steps = self.study, self.study.steps
        count = min(study.trials, SIMULATED)
        ones = (1.0,) * steps.total
        curves = [Curve(n, {}, float(row[-1]), tuple(row.tolist()), ones, ones) for n, row in enumerate(values[:count])]
        drawn = Recording("drawn", "maximize", steps.folds, steps.epochs, steps.per_epoch, {}, tuple(curves))
        name = f"run{self.random.integers(10**9)}"  # Hyperband draws a trial's bracket from it
        made = policy_of(study.pruner, study.trials, steps)(drawn, range(count), name)
        later = self.random.choice(made.steps[count // 2 :], study.trials - count)
        return np.concatenate([made.steps, later]).astype(int)

    def _all(self, prices: Durations, made: np.ndarray, share: float = 1.0) -> Outcome:
        """Trials that are begun once, and make so many reports."""
        spent = np.cumsum(prices.steps, axis=1)[np.arange(len(made)), made - 1]
        seconds = (prices.start[: len(made)] + spent) * share
        wall = schedule(seconds.tolist(), self.study.workers)
        return Outcome(tuple(made.tolist()), (1,) * len(made), float(seconds.sum()), wall)


# ---------------------------------------------------------------------- given what the trials really did


def seconds_of(
    calibration: Calibration, space: Space, pruner: PrunerConfig, history: History, refit_epochs: int
) -> float:
    """What a study of one worker should have taken on the wall, given the reports that its trials really made.

    Args:
        calibration: measured before it.
        space: that it searched.
        pruner: of the search.
        history: of the study; it is finished.
        refit_epochs: epochs of the refit; 0: there was none.
    """
    steps, sign = history.steps, 1.0 if history.goal.direction == "maximize" else -1.0
    total = calibration.start + calibration.first + calibration.finish + calibration.refit_epoch * refit_epochs
    at = rungs(pruner, steps)[0] if pruner.name == "asha" else []
    points = len({trial.number for trial in history.trials if trial.resumes is None})
    halving = Halving(len(at), pruner.reduction_factor)
    for trial in history.trials:
        cost = calibration.cost(trial.params, space, steps.epochs)
        start = 0 if trial.resumes is None else history.trials[trial.resumes].last_step
        end = steps.total if trial.outcome == "complete" else trial.last_step
        trained = {report.step for fold in trial.curve for report in fold}
        total += cost.visit + math.fsum(cost.reports(steps, [n + 1 in trained for n in range(steps.total)])[start:end])
        total += (start % steps.per_fold > 0) * (cost.resume + cost.fold)
        for rung, step in enumerate(at):
            if start < step <= end:
                halving.add(trial.number, rung, sign * trial.values[step], paused=True)
                written = (
                    trial.outcome in ("paused", "resumed")
                    and step == end
                    and halving.can_be_resumed(trial.number, points)
                )
                total += (written and step % steps.per_fold > 0) * cost.pause
    return total
