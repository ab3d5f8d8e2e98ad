"""The arithmetic of a study's hours: the seconds of a trial, and what compiling costs and saves.

Steps that are 15 % *shorter* take 0.85 of the time; steps that are 15 % *faster* take 1 / 1.15 = 0.87 of it. Of 1,038
hours the first saves 155.7, the second 135.4.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.space.parameter_sets import ends
from lightning_bge.hpo.space.search_space import Space
from lightning_bge.hpo.steps import Steps

How = Literal["shorter", "faster"]
HOUR = 3600.0


@dataclass(frozen=True)
class TrialCost:
    """Seconds of the parts of one trial.

    Attributes:
        start: to start or to resume it, besides what follows.
        fold: to start and end a fold: model, optimizer, loaders, and the excess of its first step over the others.
        epoch: to start and end an epoch, besides its steps and the batches of its validations.
        train: the optimizer steps of one epoch.
        validation: the batches of one validation.
        pause: to write a checkpoint.
        resume: to read it.
        epochs: number of epochs that it trains each fold for.
    """

    start: float
    fold: float
    epoch: float
    train: float
    validation: float
    pause: float = 0.0
    resume: float = 0.0
    epochs: int = 1

    def reports(self, steps: Steps, trained: Sequence[bool] | None = None) -> list[float]:
        """Seconds from one report of a complete trial to the next.

        Args:
            steps: folds, epochs at most, reports of each epoch. Epochs that the trial does not train cost nothing.
            trained: for each report of all folds, whether it is trained for; False where early stopping has ended the
                fold. None: all are.
        """
        part = self.train / steps.per_epoch + self.validation + self.epoch / steps.per_epoch
        found = []
        for report in range(steps.total):
            within = report % steps.per_fold
            runs = within < self.epochs * steps.per_epoch and (trained is None or trained[report])
            found.append(runs * part + (within == 0) * self.fold)
        return found

    def total(self, steps: Steps) -> float:
        """Seconds of a complete trial that is never paused."""
        return self.start + math.fsum(self.reports(steps))


def saved(hours: float, gain: float, how: How) -> float:
    """The part of these hours that is saved if steps become shorter, or faster, by this share.

    Raises:
        ConfigError: the share is negative, or at least 1 for steps that become shorter.
    """
    if gain < 0 or (how == "shorter" and gain >= 1):
        raise ConfigError(f"gain: expected a share from 0 to below 1, got {gain} ({how})")
    return hours * gain if how == "shorter" else hours - hours / (1 + gain)


class Balance(NamedTuple):
    """What compiling costs and saves, in hours.

    Attributes:
        overhead: of compiling.
        saved: of training.
        net: the difference.
    """

    overhead: float
    saved: float
    net: float


def compile_balance(hours: float, times: int, compile_s: float, gain: float, how: How) -> Balance:
    """Whether compiling pays off over a whole study.

    Args:
        hours: of training without compiling.
        times: number of compilations: one per process with an encoder cache, else one per trial.
        compile_s: seconds of one compilation.
        gain: share by which steps become shorter, or faster.
        how: which of the two the share means.
    """
    overhead, won = times * compile_s / HOUR, saved(hours, gain, how)
    return Balance(overhead, won, won - overhead)


def break_even(compile_s: float, step_s: float, gain: float, how: How = "shorter") -> float:
    """Number of optimizer steps after which compiling has paid off; infinite if it saves nothing."""
    each = saved(step_s, gain, how)
    return compile_s / each if each > 0 else math.inf


def format_hours(value: float) -> str:
    """Hours in a fitting unit: `41 s`, `12.3 min`, `4.20 h`, `1,038 h`."""
    seconds = abs(value) * HOUR
    if value < 0:
        return f"-{format_hours(-value)}"
    if seconds < 90:
        return f"{seconds:.3g} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{value:.2f} h" if value < 100 else f"{value:,.0f} h"


# Hyperparameters that change what a step computes, but not how long it takes.
FREE = (
    *(f"model.optimizer.{name}" for name in ("lr", "weight_decay", "beta1", "beta2", "eps", "layer_decay")),
    *(f"model.optimizer.init_args.{name}" for name in ("lr", "weight_decay", "eps")),
    *("model.loss", "model.schedule", "model.seed", "trainer.max_epochs"),
)
FREE_ENDINGS = ("lr", "learning_rate", "weight_decay", "momentum", "eps")  # the same of any module
NEAR = 0.1  # trials that differ in no hyperparameter weigh 100 times as much as those that differ in one


@dataclass(frozen=True)
class ParameterSets:
    """Parameter sets of the trials of a study.

    Attributes:
        space: the search space.
        params: the parameter sets.
        epochs: of a fold, where they are not searched.
        enqueued: the first so many are tried first, in this order; other trials have random ones.
    """

    space: Space
    params: Sequence[dict[str, Any]]
    epochs: int
    enqueued: int = 0


@dataclass(frozen=True)
class MeasuredTrial:
    """What a trial takes with one set of hyperparameters.

    Attributes:
        params: its hyperparameters.
        features: those of them that decide what it takes: see `features`.
        cost: of a complete trial.
        step_s: seconds of an optimizer step.
        unit_s: seconds of a unit of work in training: a token, or a batch of another project.
        error: standard error of the seconds of the steps, as a share.
    """

    params: dict[str, Any]
    features: dict[str, Any]
    cost: TrialCost
    step_s: float
    unit_s: float
    error: float


@dataclass(frozen=True)
class Calibration:
    """What the parts of a study take, in seconds.

    Attributes:
        trials: those that were measured.
        start: of a process, up to its first trial.
        first_trial: excess of the first trial of a process over later ones.
        end: of the study, without the optimizer steps of the refit: reading, exporting, writing, scoring the test file.
        refit_epoch: the optimizer steps of an epoch on all rows.
        read: excess of reading the encoder from disk over resetting the cached one.
        steps: optimizer steps of an epoch, mean over the measured trials.
        out_of_memory: number of trials that ran out of memory, besides those measured.
        took: seconds of the measurement; 0: all figures were given.
    """

    trials: tuple[MeasuredTrial, ...]
    start: float = 0.0
    first_trial: float = 0.0
    end: float = 0.0
    refit_epoch: float = 0.0
    read: float = 0.0
    steps: float = 0.0
    out_of_memory: int = 0
    took: float = 0.0

    @property
    def error(self) -> float:
        """Standard error of the training's seconds, as a share."""
        return math.sqrt(math.fsum(trial.error**2 for trial in self.trials)) / len(self.trials)

    @property
    def step_s(self) -> float:
        """Mean seconds of an optimizer step; trials with more steps count for more."""
        return fmean(trial.cost.train for trial in self.trials) / self.steps

    def cost(self, params: dict[str, Any], space: Space, epochs: int) -> TrialCost:
        """Estimate what a trial takes, as a mean of the measured ones weighted by similarity.

        Args:
            params: its hyperparameters.
            space: the search space.
            epochs: of a fold, where they are not searched.
        """
        mine = features(params, space)
        weights = [1 / (distance(mine, trial.features) + NEAR) ** 2 for trial in self.trials]

        names = ("start", "fold", "epoch", "train", "validation", "pause", "resume")
        pairs = list(zip(weights, (trial.cost for trial in self.trials), strict=True))
        found = {name: sum(w * getattr(cost, name) for w, cost in pairs) / sum(weights) for name in names}
        return TrialCost(**found, epochs=params.get("trainer.max_epochs", epochs))


def features(params: dict[str, Any], space: Space) -> dict[str, Any]:
    """The hyperparameters that decide what a trial takes: numbers scaled to 0..1, dropout as whether there is any."""
    found: dict[str, Any] = {}
    for name, distribution in space.items():
        if any(name == free or name.startswith(f"{free}.") for free in FREE) or name.split(".")[-1] in FREE_ENDINGS:
            continue
        value: Any = params.get(name)
        known = [number for number in ends(distribution) if _is_number(number)]
        if name == "model.dropout" and value is not None:
            value = value > 0
        elif _is_number(value) and max(known) > min(known):
            if getattr(distribution, "log", False):
                value, known = math.log(value), [math.log(v) for v in known]
            value = (value - min(known)) / (max(known) - min(known))
        found[name] = value
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """How much the features of two trials differ: 1 for each that is entirely different."""
    total = 0.0
    for name, value in one.items():
        if _is_number(value) and _is_number(other[name]):
            total += abs(value - other[name])
        else:
            total += value != other[name]
    return total


def choose_different(sets: ParameterSets, count: int) -> list[dict[str, Any]]:
    """Choose so many parameter sets, the first one and then always the one most different from those chosen."""
    found = [features(params, sets.space) for params in sets.params]
    chosen, near = [0], [distance(one, found[0]) for one in found]
    while len(chosen) < min(count, len(found)):
        near[chosen[-1]] = -1.0  # not a second time
        chosen.append(int(np.argmax(near)))
        near = [min(old, distance(one, found[chosen[-1]])) for old, one in zip(near, found, strict=True)]
    return [sets.params[number] for number in chosen]
