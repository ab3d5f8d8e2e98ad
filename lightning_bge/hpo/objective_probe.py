"""Anybody's Optuna objective, watched for one trial: what it reports, and whether a pruner can ever act on it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.trial import TrialState

SIMULATED = 60  # trials at most that are simulated to see whether a pruner acts


@dataclass(frozen=True)
class Reported:
    """One call of `trial.report`.

    Attributes:
        fit: the how manyth `fit` of the trial it came from, from 1; 0: before the first.
        step: as reported.
        kept: whether Optuna took it. Of several values for one step it keeps the first.
    """

    fit: int
    step: int
    kept: bool


@dataclass(frozen=True)
class Watched:
    """One trial of an objective.

    Attributes:
        fits: how often a Lightning trainer was fitted.
        reports: all of them, in order.
        asked: calls of `should_prune`.
    """

    fits: int
    reports: tuple[Reported, ...]
    asked: int

    @property
    def steps(self) -> list[int]:
        """The steps that Optuna has kept."""
        return [report.step for report in self.reports if report.kept]


def watch_objective(
    objective: Callable[[optuna.Trial], Any],
    params: dict[str, Any] | None = None,
    direction: Literal["maximize", "minimize"] = "maximize",
) -> Watched:
    """Run one trial of an objective, in a study of its own that prunes nothing.

    Args:
        objective: trains, reports and returns a value.
        params: the trial's; what is left out is drawn.
        direction: of the study, `maximize` or `minimize`.
    """
    study = optuna.create_study(direction=direction, pruner=optuna.pruners.NopPruner())
    if params:
        study.enqueue_trial(params)
    trial = study.ask()
    fits, asked, reports = 0, 0, []
    report, should_prune, fit = trial.report, trial.should_prune, pl.Trainer.fit

    def watched_report(value: float, step: int) -> None:
        kept = step not in study.trials[trial.number].intermediate_values
        reports.append(Reported(fits, step, kept))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a step was reported before: it is counted here
            report(value, step)

    def watched_should_prune() -> bool:
        nonlocal asked
        asked += 1
        return should_prune()

    def watched_fit(self: pl.Trainer, *args: Any, **options: Any) -> None:
        nonlocal fits
        fits += 1
        fit(self, *args, **options)

    trial.report, trial.should_prune = watched_report, watched_should_prune  # type: ignore[method-assign]
    pl.Trainer.fit = watched_fit  # type: ignore[method-assign]
    try:
        objective(trial)
    finally:
        pl.Trainer.fit = fit  # type: ignore[method-assign]
    return Watched(fits, tuple(reports), asked)


def would_prune(
    pruner: BasePruner, steps: list[int], n_trials: int, direction: Literal["maximize", "minimize"] = "maximize"
) -> int:
    """How many of so many simulated trials a pruner ends before their last report.

    Half of the trials learn, the other half stays at the bottom: a pruner that ends none of these can't be reached.

    Args:
        pruner: any; a copy of it is asked.
        steps: at which a trial reports, in order.
        n_trials: of the study; at most `SIMULATED` are simulated.
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
    for _ in range(min(n_trials, SIMULATED)):
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
