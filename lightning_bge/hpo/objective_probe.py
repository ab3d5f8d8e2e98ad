"""Observes one trial of any Optuna objective: what it reports, and whether a pruner can ever act on that."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.trial import TrialState

from lightning_bge.runtime.compat.lightning import count_fits

MAX_SIMULATED = 60  # trials that are simulated at most to see whether a pruner acts


@dataclass(frozen=True)
class Report:
    """One call of `trial.report`.

    Attributes:
        fit: the number of the call of `Trainer.fit` that it came from, from 1; 0: before the first.
        step: as reported.
        kept: whether Optuna stored it. Of several values for one step Optuna keeps the first.
    """

    fit: int
    step: int
    kept: bool


@dataclass(frozen=True)
class ObservedTrial:
    """One trial of an objective.

    Attributes:
        fits: calls of `Trainer.fit`.
        reports: all of them, in order.
        prune_calls: calls of `should_prune`.
    """

    fits: int
    reports: tuple[Report, ...]
    prune_calls: int

    @property
    def steps(self) -> list[int]:
        """The steps that Optuna has stored."""
        return [report.step for report in self.reports if report.kept]


class _Trial(optuna.Trial):
    """A trial that records its reports and its calls of `should_prune`."""

    def __init__(self, study: optuna.Study, trial_id: int, fits: Callable[[], int]) -> None:
        super().__init__(study, trial_id)
        self.fits = fits
        self.reports: list[Report] = []
        self.prune_calls = 0

    def report(self, value: float, step: int) -> None:
        kept = step not in self.study.trials[self.number].intermediate_values
        self.reports.append(Report(self.fits(), step, kept))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a step that was reported before: it is counted here
            super().report(value, step)

    def should_prune(self) -> bool:
        self.prune_calls += 1
        return super().should_prune()


def observe_objective(
    objective: Callable[[optuna.Trial], Any], direction: Literal["maximize", "minimize"] = "maximize"
) -> ObservedTrial:
    """Run one trial of an objective, in a study of its own that prunes nothing.

    Args:
        objective: trains, reports and returns a value.
        direction: of the study, `maximize` or `minimize`.
    """
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(
        study_name="observed", storage=storage, direction=direction, pruner=optuna.pruners.NopPruner()
    )
    trial_id = storage.create_new_trial(storage.get_study_id_from_name("observed"))
    with count_fits() as fits:
        trial = _Trial(study, trial_id, fits)
        objective(trial)
        return ObservedTrial(fits(), tuple(trial.reports), trial.prune_calls)


def would_prune(
    pruner: BasePruner, steps: list[int], n_trials: int, direction: Literal["maximize", "minimize"] = "maximize"
) -> int:
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
