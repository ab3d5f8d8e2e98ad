"""A study whose hours are to be predicted: what is run, and what its parts take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from lightning_bge.advisor.plan.calibration import Calibration, ParameterSets
from lightning_bge.advisor.plan.cost_model import TrialCost
from lightning_bge.hpo.forecast.simulator import Durations
from lightning_bge.hpo.pruning.config import PrunerConfig
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
        learns: whether the sampler learns from earlier trials (tpe).
        patience: epochs without an improvement after which a fold ends; None: there is no early stopping.
        pruned_cost: the cost of the trials with pruning, as a share of their cost without; None: it is simulated.
    """

    n_trials: int
    steps: Steps
    pruner: PrunerConfig
    workers: int = 1
    seed_replicates: int = 0
    refit: bool = True
    learns: bool = True
    patience: int | None = None
    pruned_cost: float | None = None


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

    def complete_trial(self, steps: Steps) -> float:
        """Mean seconds of a complete trial."""
        return fmean(cost.total(steps) for cost in self.trials)

    def training(self, scenario: Scenario, share: float) -> float:
        """Seconds of the optimizer steps of each worker, if pruning leaves this share of them."""
        trial = scenario.steps.folds * fmean(c.train * min(c.epochs, scenario.steps.epochs) for c in self.trials)
        return scenario.n_trials * trial * share / scenario.workers
