"""A study of given learning curves: each trial reports its curve, and is asked at every report but the last."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.trial import TrialState


def run(pruner: BasePruner, curves: Any, name: str = "s", direction: str = "maximize") -> list[int | None]:
    """The report at which each curve was stopped, or None."""
    study = optuna.create_study(study_name=name, direction=direction, pruner=pruner)
    for curve in curves:
        trial = study.ask()
        for step, value in enumerate(curve, start=1):
            trial.report(float(value), step)
            if step < len(curve) and trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, float(curve[-1]))
    return [one.last_step if one.state is TrialState.PRUNED else None for one in study.trials]
