"""Learning curves of real searches, recorded; and what any pruner would have made of them, in milliseconds.

A recording holds each trial's reports and what they cost. A replay runs its trials again in any order through a pruner
or a scheduler: what a trial would report is known, so no model is trained, and what the search would have cost is the
sum of the recorded seconds of the reports that were made. It holds for what does not choose a trial's settings by the
trials before it: random sampling, and pruners and schedulers, but no sampler that learns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from lightning_bge.errors import StudyError
from lightning_bge.hpo.pruning.asha import Standings, last_resumed, next_resumed
from lightning_bge.hpo.pruning.config import PrunerConfig, build_pruner, rungs
from lightning_bge.hpo.steps import Report, Steps
from lightning_bge.runtime.run_folder import SCHEMA_VERSION, read_json, write_text

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True)
class Curve:
    """One trial that ran to its end.

    Attributes:
        number: in its study.
        params: its settings.
        value: what it ended with: its score. None: it ended early, as a value was NaN or infinite.
        values: what it reported at the steps 1..n: means over the folds so far.
        seconds: what each of these reports took, training and validation. One thread's CPU time, where that is the
            smaller, so that other work on the machine is not in it.
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
        per_epoch: reports of each epoch.
        about: what was searched on what, as plain data.
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
    def n_reports(self) -> int:
        """Reports of a trial that runs to its end."""
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
        """What all trials took together."""
        return math.fsum(math.fsum(trial.seconds) for trial in self.trials)

    def coarser(self, per_epoch: int) -> Recording:
        """The same search with fewer reports an epoch, and without the seconds of the validations in between.

        Raises:
            StudyError: the reports there are do not fall on such steps.
        """
        stride, rest = divmod(self.per_epoch, per_epoch)
        if rest or stride < 1:
            raise StudyError(f"{self.name} has {self.per_epoch} reports an epoch, which {per_epoch} does not divide")
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
    """The curves of a finished study without pruning.

    Raises:
        StudyError: a trial was pruned, so that its end is not known; or it has no curve, as it is of an older version.
    """
    steps = folds * epochs * per_epoch
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    for trial in trials:
        if trial.state == TrialState.PRUNED and "nan" not in trial.user_attrs:
            raise StudyError(f"{study.study_name}: trial {trial.number} was pruned: record a search without pruning")
        if "curve" not in trial.user_attrs:
            raise StudyError(f"{study.study_name}: trial {trial.number} has no record of its seconds: run it anew")
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


# ---------------------------------------------------------------------- replaying


@dataclass(frozen=True)
class Replay:
    """What a search would have been.

    Attributes:
        seconds: what it would have taken.
        found: for each trial that ran to its end, in order: the seconds since the start, and its value.
        reports: how many reports each trial would have made, in the order in which they ran.
        order: the trials' numbers, in that order.
    """

    seconds: float
    found: tuple[tuple[float, float], ...]
    reports: tuple[int, ...]
    order: tuple[int, ...]


Policy = Callable[[Recording, Sequence[int], str], Replay]


def policy_of(config: PrunerConfig, n_trials: int, steps: Steps) -> Policy:
    """The policy that a study with these settings follows."""
    if config.name == "asha":
        [at] = rungs(config, steps)
        return lambda recording, order, name: replay_asha(recording, at, config.reduction_factor, order)
    return lambda recording, order, name: replay_pruned(recording, build_pruner(config, n_trials, steps), order, name)


def replay_pruned(recording: Recording, pruner: BasePruner, order: Sequence[int], name: str = "replay") -> Replay:
    """Run the trials again, in this order, through an Optuna pruner.

    Args:
        recording: what the trials report, and its seconds.
        pruner: any of Optuna's or ours.
        order: places in `recording.trials`.
        name: of the study; Hyperband draws a trial's bracket from it.
    """
    study = optuna.create_study(
        study_name=name, direction=recording.direction, pruner=pruner, sampler=RandomSampler(seed=0)
    )
    clock, found, reports = 0.0, [], []
    for place in order:
        curve, trial = recording.trials[place], study.ask()
        made = 0
        for made, (value, seconds) in enumerate(zip(curve.values, curve.seconds, strict=True), start=1):
            clock += seconds
            if math.isfinite(value):
                trial.report(value, made)
            if made < recording.n_reports and math.isfinite(value) and trial.should_prune():
                break
        reports.append(made)
        if made == recording.n_reports and curve.value is not None:
            study.tell(trial, curve.value)
            found.append((clock, curve.value))
        else:
            study.tell(trial, state=TrialState.PRUNED)
    return Replay(clock, tuple(found), tuple(reports), tuple(order))


def replay_asha(recording: Recording, steps: Sequence[int], eta: int, order: Sequence[int]) -> Replay:
    """Run the trials again, in this order, as `asha` would: paused at rungs, resumed when they have earned it.

    Args:
        recording: what the trials report, and its seconds.
        steps: the rungs' reports, ascending.
        eta: one in so many of a rung's trials goes on.
        order: places in `recording.trials`.
    """
    sign = recording.sign
    ends = [*steps, recording.n_reports]
    clock = 0.0
    found: list[tuple[float, float]] = []
    there: dict[int, dict[int, float]] = {}
    over: set[int] = set()
    reports = [0] * len(order)
    begun = 0
    while (point := _next_point(there, len(steps), eta, over, begun, len(order), bool(found))) is not None:
        begun = max(begun, point + 1)
        curve = recording.trials[order[point]]
        values = there.get(point, {})
        end = ends[len(values)]
        clock += math.fsum(curve.seconds[reports[point] : end])
        reports[point] = min(end, len(curve.values))
        if len(values) == len(steps):
            over.add(point)
            if curve.value is not None:
                found.append((clock, curve.value))
        elif curve.value is None and len(curve.values) <= end:
            over.add(point)  # ended by a NaN, which is not reported
        else:
            there.setdefault(point, {})[len(values)] = sign * curve.values[end - 1]
    return Replay(clock, tuple(found), tuple(reports), tuple(order))


def _next_point(
    there: Standings, rungs: int, eta: int, over: set[int], begun: int, points: int, complete: bool
) -> int | None:
    point = next_resumed(there, rungs, eta, over)
    if point is not None:
        return point
    return begun if begun < points else last_resumed(there, over, complete)


def oracle(recording: Recording, order: Sequence[int], name: str = "") -> Replay:
    """A search that knows each trial's end before it starts, and runs only those that will be the best so far.

    No pruner can do that: it shows how far the best of them is from what is possible.
    """
    sign = recording.sign
    clock, best, found, reports = 0.0, -math.inf, [], []
    for place in order:
        curve = recording.trials[place]
        worth = curve.value is not None and sign * curve.value > best
        reports.append(len(curve.values) if worth else 0)
        if worth:
            assert curve.value is not None
            clock, best = clock + math.fsum(curve.seconds), sign * curve.value
            found.append((clock, curve.value))
    return Replay(clock, tuple(found), tuple(reports), tuple(order))


def regret(recording: Recording, run: Replay, seconds: float) -> float:
    """How far the best value found by then is from the best of all, as a share of it; 1 before any trial has ended."""
    values = [value for at, value in run.found if at <= seconds]
    if not values:
        return 1.0
    best = max(values) if recording.direction == "maximize" else min(values)
    return min(1.0, abs(best - recording.best) / abs(recording.best))


def mean_regret(recording: Recording, run: Replay) -> float:
    """The regret's mean over the time that the search takes without pruning: one number for speed and for the end."""
    full, sign = recording.full_seconds, recording.sign
    total, since, now, best = 0.0, 0.0, 1.0, -math.inf
    for at, value in run.found:
        if sign * value > best:
            best = sign * value
            total += now * (min(at, full) - since)
            since, now = min(at, full), min(1.0, abs(value - recording.best) / abs(recording.best))
    return (total + now * (full - since)) / full


def share_to_reach(recording: Recording, run: Replay, within: float = 0.01) -> float | None:
    """Hours until the best value was found, as a share of the hours without pruning; None: it never was.

    Args:
        recording: what was replayed.
        run: the replay.
        within: how near counts, as a share of the best value.
    """
    room = within * abs(recording.best)
    return next((at / recording.full_seconds for at, value in run.found if abs(value - recording.best) <= room), None)
