"""What a tracker is to have of a trial, computed from the trial alone: so any process can write it at any time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.ranking import cost_of, score_of
from lightning_bge.hpo.steps import Report
from lightning_bge.hpo.trials import (
    ERROR,
    INTERRUPTED,
    PAUSED_AT,
    RESUMES,
    RETRY_OF,
    WORKER_LOST,
    is_attempt,
    parameter_set_of,
)

Points = Mapping[str, Mapping[int, float]]  # name of a metric -> step -> value
LINKS = (RESUMES, RETRY_OF, "replicate_of", "seed")  # user attributes that say which other trials a trial belongs to
REASONS = (PAUSED_AT, "pruned_at", "nan", "oom_where", ERROR, WORKER_LOST, INTERRUPTED)  # and how it ended
TAG_LENGTH = 500  # characters that every tracker takes
KEY_DIGITS = 16  # hexadecimal ones: two of 10**6 runs are the same once in 10**7 such sets


@dataclass(frozen=True)
class StudyRecord:
    """What a tracker is to have of a study.

    Attributes:
        key: unique, and the same in all processes.
        name: shown to users.
        metric: name of the score.
        run_dir: the run's folder on this machine.
    """

    key: str
    name: str
    metric: str
    run_dir: Path


@dataclass(frozen=True)
class TrialRecord:
    """What a tracker is to have of a trial.

    Attributes:
        key: unique, and the same in all processes and after each restart.
        name: unique within its study, and shown to users.
        kind: `trial`, `seed replicate` or `baseline`.
        params: hyperparameters by their dotted names.
        tags: the trial's number, and which other trials it belongs to.
        points: what it has reported: the mean over the folds so far under the metric's name, which is what Optuna has,
            and each fold's validations as `fold_K/METRIC` and `fold_K/loss`. Values that are not finite are left out.
        state: `complete`, `pruned`, `paused`, `failed` or `killed`; None while it runs.
        values: its `value`, and its `cost` where there is one; empty unless it is complete.
        start: local time.
        end: local time; None while it runs.
    """

    key: str
    name: str
    kind: str
    params: dict[str, Any]
    tags: dict[str, str]
    points: Points
    state: str | None
    values: dict[str, float]
    start: datetime
    end: datetime | None

    @property
    def n_points(self) -> int:
        """How many points there are in all."""
        return sum(map(len, self.points.values()))

    @property
    def last_step(self) -> int:
        """The last step of any point; 0 before the first."""
        return max((step for values in self.points.values() for step in values), default=0)


def record_of(study: StudyRecord, trial: FrozenTrial, curve: Sequence[Sequence[Report]] = ()) -> TrialRecord:
    """Describe a trial.

    Args:
        study: its study, or that whose seed replicate or baseline it is.
        trial: one that `has_run`.
        curve: the validations of each fold so far, of a trial that runs.
    """
    known, start = trial.user_attrs, trial.datetime_start
    assert start is not None
    kind = "seed replicate" if "replicate_of" in known else "baseline" if "configured" in known else "trial"
    # with the time: a folder that was copied goes on with other trials of the same numbers
    text = f"{study.key} {kind} {trial.number} {start.isoformat()}"
    state, reports = state_of(trial), [[Report(*report) for report in fold] for fold in known.get("curve", curve)]
    tags = {"trial": trial.number, "kind": kind, "parameter_set": parameter_set_of(trial)}
    tags |= {name: known[name] for name in LINKS if name in known}
    tags |= {name: known[name] for name in REASONS if name in known} if state is not None else {}
    values = {"value": score_of(trial), "cost": cost_of(trial)} if trial.state == TrialState.COMPLETE else {}
    return TrialRecord(
        key=hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS],
        name=f"{kind.replace(' ', '-')}-{trial.number:04}",
        kind=kind,
        params=dict(trial.params),
        tags={name: str(value)[:TAG_LENGTH] for name, value in tags.items()},
        points=_points(study.metric, trial, reports),
        state=state,
        values={name: value for name, value in values.items() if value is not None},
        start=start,
        end=trial.datetime_complete,
    )


def has_run(trial: FrozenTrial) -> bool:
    """Whether a trial has a run in a tracker: it was begun to be trained."""
    return is_attempt(trial) and trial.datetime_start is not None


def state_of(trial: FrozenTrial) -> str | None:
    """How a trial has ended, in one word; None: it runs."""
    known = trial.user_attrs
    if trial.state == TrialState.COMPLETE:
        return "complete"
    if trial.state == TrialState.PRUNED:
        return "paused" if PAUSED_AT in known and "oom_where" not in known else "pruned"
    if trial.state != TrialState.FAIL:
        return None
    return "killed" if ERROR not in known and (WORKER_LOST in known or INTERRUPTED in known) else "failed"


def _points(metric: str, trial: FrozenTrial, curve: Sequence[Sequence[Report]]) -> Points:
    found: dict[str, dict[int, float]] = {metric: dict(trial.intermediate_values)}
    for number, fold in enumerate(curve):
        found[f"fold_{number}/{metric}"] = {report.step: report.value for report in fold}
        if metric != "loss":
            losses = {report.step: report.loss for report in fold if report.loss is not None}
            found[f"fold_{number}/loss"] = losses
    finite = {
        name: {step: value for step, value in values.items() if math.isfinite(value)} for name, values in found.items()
    }
    return {name: values for name, values in finite.items() if values}


def new_points(points: Points, known: Points) -> dict[int, dict[str, float]]:
    """The points that are not known, as step -> name of a metric -> value, by ascending steps."""
    found: dict[int, dict[str, float]] = {}
    for name, values in points.items():
        for step in values.keys() - known.get(name, {}).keys():
            found.setdefault(step, {})[name] = values[step]
    return dict(sorted(found.items()))
