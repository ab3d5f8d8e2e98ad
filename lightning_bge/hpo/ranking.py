"""How trials are compared: by the score first, then by the cost, where a study has one."""

from collections.abc import Sequence
from statistics import median
from typing import Any, Literal

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.steps import Report

CostName = Literal["train_seconds", "predict_seconds"]


def score_of(trial: FrozenTrial) -> float | None:
    """The metric's value; None: the trial has none. Optuna's `trial.value` is refused where there is a cost as well."""
    return trial.values[0] if trial.values else None


def cost_of(trial: FrozenTrial) -> float | None:
    """The cost in seconds; None: the study has none, or the trial did not run to its end."""
    return trial.values[1] if trial.values and len(trial.values) > 1 else None


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """The complete trials, the best score first, of equal ones the cheaper, then the older; they are not copies.

    The first of them is Optuna's `best_trial`, which is refused where there is a cost as well.
    """
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = sign_of(study)
    return sorted(done, key=lambda trial: (-sign * trial.values[0], *trial.values[1:], trial.number))


def best_parameter_sets(study: optuna.Study, count: int) -> list[FrozenTrial]:
    """The best complete trials, one for each parameter set."""
    found: dict[tuple[tuple[str, Any], ...], FrozenTrial] = {}
    for trial in ranked(study):
        found.setdefault(tuple(sorted(trial.params.items())), trial)
    return list(found.values())[:count]


def maximizes(study: optuna.Study) -> bool:
    """Whether a higher score is better."""
    return study.directions[0] == StudyDirection.MAXIMIZE


def sign_of(study: optuna.Study) -> float:
    """1 where a higher score is better, else -1."""
    return 1.0 if maximizes(study) else -1.0


def front(study: optuna.Study) -> list[FrozenTrial]:
    """The Pareto-optimal trials, the best score first: no other has both a better score and a lower cost."""
    numbers = {trial.number for trial in study.best_trials}
    return [trial for trial in ranked(study) if trial.number in numbers]


def cost(name: CostName, curve: Sequence[Sequence[Report]], rows: Sequence[int]) -> float:
    """A trial's cost in seconds of wall-clock time.

    Args:
        name: `train_seconds`: of training, over all folds; building and setting up are in it, validation is not.
            `predict_seconds`: of validating 1,000 rows, the median over all validations, as the first ones also pay
            for compiling and for cold caches.
        curve: each fold's validations.
        rows: each fold's number of validation rows.
    """
    if name == "train_seconds":
        return sum(report.train_seconds for fold in curve for report in fold)
    return median(1000 * report.val_seconds / count for fold, count in zip(curve, rows, strict=True) for report in fold)
