"""Predict the hours of a study, with an interval: simulate it many times with the costs of its trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from lightning_bge.advisor.plan.cost_model import Calibration, ParameterSets, TrialCost
from lightning_bge.hpo.config import BEST
from lightning_bge.hpo.forecast.preview import SIMULATED, STYLES, sample_curves
from lightning_bge.hpo.forecast.recording import Curve, Recording
from lightning_bge.hpo.forecast.replay import policy_of
from lightning_bge.hpo.forecast.simulator import STARTUP, Durations, Outcome, schedule, simulate_asha, skill
from lightning_bge.hpo.forecast.trial_times import refit_epochs
from lightning_bge.hpo.pruning.config import PrunerConfig, rungs
from lightning_bge.hpo.steps import Steps


@dataclass(frozen=True)
class Scenario:
    """What is run.

    Attributes:
        n_trials: number of trials.
        steps: the steps at which a complete trial reports.
        pruner: of the study.
        workers: processes that share the study, each on its own device.
        seed_replicates: number of further seeds with which the best trials (`hpo.BEST`, or as many as are complete) are
            trained at the end.
        refit: whether a model is trained on all rows at the end.
        baseline: whether the configured options are trained at the end, as one trial more that is not pruned.
        learns: whether the sampler learns from earlier trials (tpe).
        patience: epochs without an improvement after which a fold ends; None: there is no early stopping.
        min_delta: what counts as an improvement; generated learning curves have values from 0 to 1.
    """

    n_trials: int
    steps: Steps
    pruner: PrunerConfig
    workers: int = 1
    seed_replicates: int = 0
    refit: bool = True
    baseline: bool = False
    learns: bool = True
    patience: int | None = None
    min_delta: float = 0.0


@dataclass(frozen=True)
class StudyCosts:
    """What the parts of a study take, in seconds.

    Attributes:
        trials: costs of M parameter sets of the space.
        calibration: the measurement.
        enqueued: the first so many parameter sets are tried first, in this order; other trials have random ones.
        compile_s: seconds that each worker spends on trying to compile.
    """

    trials: Sequence[TrialCost]
    calibration: Calibration
    enqueued: int = 0
    compile_s: float = 0.0

    @classmethod
    def of(cls, calibration: Calibration, sets: ParameterSets) -> StudyCosts:
        """Estimate the costs of these parameter sets."""
        trials = [calibration.cost(params, sets.space, sets.epochs) for params in sets.params]
        return cls(trials, calibration, sets.enqueued)

    def column(self, name: str) -> np.ndarray:
        """One part of the costs of all parameter sets, [M]."""
        return np.array([getattr(cost, name) for cost in self.trials], dtype=float)

    def scaled(self, train: float, validation: float) -> StudyCosts:
        """With other numbers of rows, as multiples of those now."""
        scaled = [replace(c, train=c.train * train, validation=c.validation * validation) for c in self.trials]
        return replace(self, trials=scaled)

    def durations(self, steps: Steps, at: Sequence[int], chosen: np.ndarray, trained: np.ndarray) -> Durations:
        """Durations for the simulator.

        Args:
            steps: of the trials.
            at: steps at which they may pause.
            chosen: parameter sets, int [N].
            trained: whether each report is trained for, or left out by early stopping, bool [N, R].
        """
        within = np.arange(steps.total) % steps.per_fold
        runs = within < self.column("epochs")[:, None] * steps.per_epoch
        part = (self.column("train") + self.column("epoch")) / steps.per_epoch + self.column("validation")
        fold = self.column("fold")
        reports = (part[:, None] * runs)[chosen] * trained + (fold[:, None] * (within == 0))[chosen]
        # a pause at the last report of a fold writes no checkpoint, and the fold is not started a second time
        inside = np.array([step % steps.per_fold > 0 for step in at], dtype=float)
        pause, resume = self.column("pause")[chosen], (self.column("resume") + fold)[chosen]
        return Durations(self.column("start")[chosen], reports, np.outer(pause, inside), np.outer(resume, inside))

    def training(self, scenario: Scenario, share: float) -> float:
        """Seconds of the optimizer steps of each worker, if pruning leaves this share of them."""
        trial = scenario.steps.folds * fmean(c.train * min(c.epochs, scenario.steps.epochs) for c in self.trials)
        return scenario.n_trials * trial * share / scenario.workers


RUNS = 80
FEW = 12  # runs with a pruner of Optuna's, each of which takes up to half a second
CURVES = 150  # generated ones to choose from, of each style
# Standard deviation of a machine's speed over the hours of a study relative to the minute of the measurement: the error
# of plans for known numbers of reports (docs/benchmarks/plan_accuracy.md). It differs between machines.
DRIFT = 0.06


@dataclass(frozen=True)
class Prediction:
    """Seconds of a study.

    Attributes:
        low: wall-clock seconds, 10 % quantile.
        mid: wall-clock seconds, median.
        high: wall-clock seconds, 90 % quantile.
        unpruned: of all trials without pruning, on one worker, without the start and the end of the study.
        pruned: of the trials with pruning, all workers together.
        start_and_end: wall-clock seconds of start, end, and what is done once.
        share: `pruned` over `unpruned`: 10 % quantile, median, 90 % quantile.
        complete: number of complete trials.
    """

    low: float
    mid: float
    high: float
    unpruned: float
    pruned: float
    start_and_end: float
    share: tuple[float, float, float]
    complete: float


def predict(scenario: Scenario, costs: StudyCosts, runs: int = RUNS, seed: int = 0) -> Prediction:
    """Simulate a study many times.

    Each simulation draws the hyperparameters of the trials, their learning curves and order, how much the sampler
    learns, the error of the measurement, and the speed of the machine.

    Args:
        scenario: what is run.
        costs: what its parts take.
        runs: number of simulations; at most `FEW` with Optuna's pruners, which are slow.
        seed: of all random numbers.
    """
    random, steps, known = np.random.default_rng(seed), scenario.steps, costs.calibration
    curves = learning_curves(scenario)
    if scenario.pruner.name not in ("asha", "none"):
        runs = min(runs, FEW)
    trial = fmean(cost.total(steps) for cost in costs.trials)
    unpruned = trial * scenario.n_trials
    start_and_end = known.start + known.first_trial + known.end + costs.compile_s
    start_and_end += trial * scenario.baseline
    start_and_end += known.refit_epoch * scenario.refit * refit_epochs(steps.epochs)
    walls, shares, found = [], [], []
    for number in range(runs):
        run = _simulate(scenario, costs, curves[number % len(curves)], random)
        speed = max(0.3, (1 + known.error * random.standard_normal()) * (1 + DRIFT * random.standard_normal()))
        replicates = min(BEST, run.complete(steps.total)) * scenario.seed_replicates
        replicates_s = trial * math.ceil(replicates / scenario.workers) + known.read * (replicates > 0)
        walls.append((run.wall + start_and_end + replicates_s) * speed)
        shares.append(run.seconds / unpruned)
        found.append(run)
    low, mid, high = (float(value) for value in np.quantile(walls, [0.1, 0.5, 0.9]))
    return Prediction(
        low=low,
        mid=mid,
        high=high,
        unpruned=unpruned,
        pruned=fmean(run.seconds for run in found),
        start_and_end=start_and_end,
        share=tuple(float(value) for value in np.quantile(shares, [0.1, 0.5, 0.9])),  # type: ignore[arg-type]
        complete=fmean(run.complete(steps.total) for run in found),
    )


# ---------------------------------------------------------------------- one simulation


def _simulate(scenario: Scenario, costs: StudyCosts, curves: LearningCurves, random: np.random.Generator) -> Outcome:
    """Run a study whose trials and curves are drawn at random."""
    steps, n_trials, pruner = scenario.steps, scenario.n_trials, scenario.pruner
    count = n_trials + scenario.workers
    enqueued = min(costs.enqueued, count)
    chosen = np.arange(enqueued)
    if enqueued < count:
        others = random.integers(costs.enqueued, len(costs.trials), count - enqueued)
        chosen = np.concatenate([chosen, others])
    place = random.random(count)
    if scenario.learns:  # better curves, once the sampler has begun to learn
        place[STARTUP:] **= skill(random)
    place = (place * len(curves.values)).astype(int)
    at: Sequence[int] = rungs(pruner, steps)[0] if pruner.name == "asha" else ()
    durations = costs.durations(steps, at, chosen, curves.trained[place])
    if pruner.name == "none":
        return _without_pauses(durations, np.full(n_trials, steps.total), scenario.workers)
    values = curves.values[place]
    # a curve that is drawn twice must not give equal values
    values = values + random.normal(0, 1e-3 * (float(values.std()) + 1e-9), (count, 1))
    if pruner.name == "asha":
        return simulate_asha(at, pruner.reduction_factor, n_trials, values, durations, scenario.workers)
    return _without_pauses(durations, _pruned_steps(scenario, values, random), scenario.workers)


def _pruned_steps(scenario: Scenario, values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Number of steps of each trial under one of Optuna's pruners, int [N].

    Of many trials only the first `SIMULATED` are run with the pruner. The others are drawn from their second half.
    """
    steps, n_trials = scenario.steps, scenario.n_trials
    count = min(n_trials, SIMULATED)
    ones = (1.0,) * steps.total
    curves = [Curve(n, {}, float(row[-1]), tuple(row.tolist()), ones, ones) for n, row in enumerate(values[:count])]
    drawn = Recording("drawn", "maximize", steps.folds, steps.epochs, steps.per_epoch, {}, tuple(curves))
    name = f"run{random.integers(10**9)}"  # Hyperband derives the bracket of a trial from it
    made = policy_of(scenario.pruner, n_trials, steps)(drawn, range(count), name)
    later = random.choice(made.steps[count // 2 :], n_trials - count)
    return np.concatenate([made.steps, later]).astype(int)


def _without_pauses(durations: Durations, made: np.ndarray, workers: int) -> Outcome:
    """Trials that make so many steps without a pause."""
    spent = np.cumsum(durations.steps, axis=1)[np.arange(len(made)), made - 1]
    seconds = durations.start[: len(made)] + spent
    wall = schedule(seconds.tolist(), workers)
    return Outcome(tuple(made.tolist()), (1,) * len(made), float(seconds.sum()), wall)


# ---------------------------------------------------------------------- learning curves


@dataclass(frozen=True)
class LearningCurves:
    """Learning curves to draw from, in the order of their last values, the best one first.

    Attributes:
        values: [C, R], higher is better.
        trained: bool [C, R], whether each report is trained for, or left out by early stopping.
    """

    values: np.ndarray
    trained: np.ndarray


def learning_curves(scenario: Scenario) -> list[LearningCurves]:
    """Generated ones of each style."""
    count = max(20, min(CURVES, 60_000 // scenario.steps.total))
    samples = [sample_curves(count, scenario.steps, seed, style) for seed in (0, 1) for style in STYLES]
    return [_fit_curves(recording, scenario) for recording in samples]


def _fit_curves(recording: Recording, scenario: Scenario) -> LearningCurves:
    """Stretch curves of another number of reports, so that ranks hold at the same part of the whole."""
    steps = scenario.steps
    at = np.ceil(np.arange(1, steps.total + 1) * recording.n_steps / steps.total).astype(int) - 1
    whole = [curve for curve in recording.trials if len(curve.values) == recording.n_steps]
    values = recording.sign * np.array([curve.values for curve in whole])[:, at]
    values = values[np.argsort(-values[:, -1], kind="stable")]
    return LearningCurves(values, _trained(values, scenario))


def _trained(values: np.ndarray, scenario: Scenario) -> np.ndarray:
    """Which reports are trained for if a fold ends after so many epochs without an improvement, bool [C, R]."""
    found, steps, patience = np.ones(values.shape, dtype=bool), scenario.steps, scenario.patience
    if patience is None:
        return found
    ends = np.zeros(len(values))  # the sum of the folds so far
    for fold in range(steps.folds):
        first = fold * steps.per_fold
        # the best of the fold so far, as its part of the mean over the folds
        best = values[:, first : first + steps.per_fold] * (fold + 1) - ends[:, None]
        whole = best[:, steps.per_epoch - 1 :: steps.per_epoch]
        since, reference = np.zeros(len(values), dtype=int), whole[:, 0]
        stopped = np.full(len(values), steps.epochs)
        for epoch in range(1, steps.epochs):
            improved = whole[:, epoch] > reference + scenario.min_delta + 1e-9
            since, reference = np.where(improved, 0, since + 1), np.where(improved, whole[:, epoch], reference)
            stopped = np.where((since >= patience) & (stopped == steps.epochs), epoch + 1, stopped)
        within = np.arange(steps.per_fold) // steps.per_epoch
        found[:, first : first + steps.per_fold] = within < stopped[:, None]
        ends = ends + best[:, -1]
    return found
