"""Learning curves of real searches, recorded: what each trial reported at each step, and the seconds that it took."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.trial import TrialState

from lightning_bge.errors import StudyError
from lightning_bge.hpo.steps import Report
from lightning_bge.runtime.run_folder import SCHEMA_VERSION, read_json, write_text


@dataclass(frozen=True)
class Curve:
    """One trial that ran to its end.

    Attributes:
        number: in its study.
        params: its hyperparameters.
        value: its score at the end. None: it ended early, as a value was NaN or infinite.
        values: what it reported at the steps 1..n: means over the folds so far.
        seconds: what each of these steps took, training and validation. The process's CPU time where that is the
            smaller one, so that other work on the machine is not in it.
        validation: the part of `seconds` that is validation.
    """

    number: int
    params: dict[str, Any]
    value: float | None
    values: tuple[float, ...]
    seconds: tuple[float, ...]
    validation: tuple[float, ...]


@dataclass(frozen=True)
class Recording:
    """The curves of a search whose trials all ran to their end.

    Attributes:
        name: of the search.
        direction: `maximize` or `minimize`.
        folds: of each trial.
        epochs: of each fold.
        per_epoch: steps of each epoch.
        about: what was searched, and on which data, as plain data.
        trials: one curve each.
    """

    name: str
    direction: Literal["maximize", "minimize"]
    folds: int
    epochs: int
    per_epoch: int
    about: dict[str, Any]
    trials: tuple[Curve, ...]

    @property
    def n_steps(self) -> int:
        """Steps of a trial that runs to its end."""
        return self.folds * self.epochs * self.per_epoch

    @property
    def sign(self) -> float:
        """1 where a higher value is better, else -1."""
        return 1.0 if self.direction == "maximize" else -1.0

    @cached_property
    def best(self) -> float:
        """The best value of any trial."""
        values = [trial.value for trial in self.trials if trial.value is not None]
        return max(values) if self.direction == "maximize" else min(values)

    @cached_property
    def full_seconds(self) -> float:
        """Seconds of all trials together."""
        return math.fsum(math.fsum(trial.seconds) for trial in self.trials)

    def coarser(self, per_epoch: int) -> Recording:
        """The same search with fewer steps an epoch, and without the seconds of the validations in between.

        Args:
            per_epoch: steps of each epoch.

        Raises:
            StudyError: `per_epoch` does not divide the recorded number.
        """
        stride, rest = divmod(self.per_epoch, per_epoch)
        if rest or stride < 1:
            raise StudyError(
                f"{self.name} has {self.per_epoch} steps an epoch, which per_epoch={per_epoch} does not divide"
            )
        trials = tuple(_coarser(trial, stride) for trial in self.trials)
        return Recording(self.name, self.direction, self.folds, self.epochs, per_epoch, self.about, trials)

    def save(self, path: Path) -> None:
        """Write it as JSON, one line a trial."""
        head = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        trials = ",\n".join(json.dumps(trial) for trial in head.pop("trials"))
        text = json.dumps(head, indent=2).removesuffix("\n}")
        write_text(path, f'{text},\n  "trials": [\n{trials}\n]}}\n')

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read what `save` wrote.

        Raises:
            StudyError: there is no such file, or it is of another version.
        """
        content = read_json(path)
        if content is None:
            raise StudyError(f"{path}: expected a recording of schema version {SCHEMA_VERSION}; record the search anew")
        content.pop("schema_version")
        names = ("values", "seconds", "validation")
        trials = tuple(
            Curve(**{**trial, **{name: tuple(trial[name]) for name in names}}) for trial in content["trials"]
        )
        return cls(**{**content, "trials": trials})


def _coarser(trial: Curve, stride: int) -> Curve:
    steps = range(stride, len(trial.values) + 1, stride)
    left_out = [math.fsum(trial.validation[step - stride : step - 1]) for step in steps]
    return Curve(
        trial.number,
        trial.params,
        trial.value,
        tuple(trial.values[step - 1] for step in steps),
        tuple(math.fsum(trial.seconds[step - stride : step]) - out for step, out in zip(steps, left_out, strict=True)),
        tuple(trial.validation[step - 1] for step in steps),
    )


def record_study(study: optuna.Study, name: str, folds: int, epochs: int, per_epoch: int, **about: Any) -> Recording:
    """The learning curves of a finished study without pruning.

    Args:
        study: the study.
        name: of the recording.
        folds: of each trial.
        epochs: of each fold.
        per_epoch: steps of each epoch.
        about: what was searched, and on which data, as plain data.

    Raises:
        StudyError: a trial was pruned, so that its end is not known; or it has no user attribute `curve`.
    """
    steps = folds * epochs * per_epoch
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    for trial in trials:
        if trial.state == TrialState.PRUNED and "nan" not in trial.user_attrs:
            raise StudyError(f"{study.study_name}: trial {trial.number} was pruned: record a search without pruning")
        if "curve" not in trial.user_attrs:
            raise StudyError(
                f"{study.study_name}: trial {trial.number} has no record of its seconds: "
                "run the search with `lightning-bge hpo`"
            )
    direction: Any = study.direction.name.lower()
    curves = tuple(_curve(trial, steps) for trial in trials)
    return Recording(name, direction, folds, epochs, per_epoch, about, curves)


def _curve(trial: optuna.trial.FrozenTrial, steps: int) -> Curve:
    seconds, validation = np.zeros(steps), np.zeros(steps)
    reports = [Report(*report) for fold in trial.user_attrs["curve"] for report in fold]
    for report in reports:
        seconds[report.step - 1] += min(report.train_seconds, report.train_cpu) + min(
            report.val_seconds, report.val_cpu
        )
        validation[report.step - 1] += min(report.val_seconds, report.val_cpu)
    last = steps if trial.state == TrialState.COMPLETE else reports[-1].step
    values = [trial.intermediate_values.get(step, math.nan) for step in range(1, last + 1)]
    value = trial.value if trial.state == TrialState.COMPLETE else None
    rounded = (tuple(round(float(number), 6) for number in row[:last]) for row in (values, seconds, validation))
    return Curve(trial.number, dict(trial.params), value, *rounded)
