"""Observes one trial of any Optuna objective: what it reports, and whether a pruner can ever act on that."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.trial import TrialState

from lightning_bge.runtime.compat.lightning import count_fits

MAX_SIMULATED = 60  # trials that are simulated at most to see whether a pruner acts
Direction = Literal["maximize", "minimize"]


class ObservedTrial(optuna.Trial):
    """A trial that records its reports and its calls of `should_prune`.

    Attributes:
        fits: calls of `Trainer.fit`.
        reports: the number of the call of `fit` that each report came from, from 1, 0 before the first; the step;
            whether Optuna stored it: of several values for one step Optuna keeps the first.
        prune_calls: calls of `should_prune`.
    """

    def __init__(self, study: optuna.Study, trial_id: int) -> None:
        super().__init__(study, trial_id)
        self.fits, self.prune_calls = 0, 0
        self.reports: list[tuple[int, int, bool]] = []

    def observe(self, objective: Callable[[optuna.Trial], Any]) -> None:
        """Call the objective with this trial."""
        with count_fits() as self._count:
            objective(self)
            self.fits = self._count()

    def report(self, value: float, step: int) -> None:
        """Record a report, and store it."""
        self.reports.append((self._count(), step, step not in self.study.trials[self.number].intermediate_values))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a step that was reported before: it is counted here
            super().report(value, step)

    def should_prune(self) -> bool:
        """Count the call."""
        self.prune_calls += 1
        return super().should_prune()


def observe_objective(objective: Callable[[optuna.Trial], Any], direction: Direction = "maximize") -> ObservedTrial:
    """Run one trial of an objective, in a study of its own that prunes nothing.

    Args:
        objective: trains, reports and returns a value.
        direction: of the study, `maximize` or `minimize`.
    """
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(
        study_name="observed", storage=storage, direction=direction, pruner=optuna.pruners.NopPruner()
    )
    trial = ObservedTrial(study, storage.create_new_trial(storage.get_study_id_from_name("observed")))
    trial.observe(objective)
    return trial


def would_prune(pruner: BasePruner, steps: list[int], n_trials: int, direction: Direction = "maximize") -> int:
    """The number of simulated trials that a pruner ends before their last report.

    Half of the trials learn, the other half does not: a pruner that ends none of these can never act.

    Args:
        pruner: any; it is copied.
        steps: at which a trial reports, in order.
        n_trials: of the study; at most `MAX_SIMULATED` are simulated.
        direction: of the study.
    """
    study = optuna.create_study(
        study_name="simulated",
        direction=direction,
        pruner=copy.deepcopy(pruner),
        sampler=optuna.samplers.RandomSampler(),
    )
    sign = 1.0 if direction == "maximize" else -1.0
    rng, ended = np.random.default_rng(0), 0
    for _ in range(min(n_trials, MAX_SIMULATED)):
        trial, end = study.ask(), rng.choice([0.0, 1.0])
        for number, step in enumerate(steps, start=1):
            trial.report(sign * end * (1 - math.exp(-number)) + rng.normal(0, 1e-3), step)
            if number < len(steps) and trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                ended += 1
                break
        else:
            study.tell(trial, sign * end)
    return ended
