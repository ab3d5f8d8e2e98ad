"""What the parts of a study take in seconds, from a few measured trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from lightning_bge.advisor.plan.cost_model import TrialCost
from lightning_bge.hpo.space.parameter_sets import ends
from lightning_bge.hpo.space.search_space import Space

# Hyperparameters that change what a step computes, but not how long it takes.
FREE = (
    *(f"model.optimizer.{name}" for name in ("lr", "weight_decay", "beta1", "beta2", "eps", "layer_decay")),
    *("model.loss", "model.schedule", "model.seed", "trainer.max_epochs"),
)
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
        token_s: seconds of a token in training.
        error: standard error of the seconds of the steps, as a share.
    """

    params: dict[str, Any]
    features: dict[str, Any]
    cost: TrialCost
    step_s: float
    token_s: float
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

        def mean(name: str) -> float:
            return sum(w * getattr(t.cost, name) for w, t in zip(weights, self.trials, strict=True)) / sum(weights)

        names = ("start", "fold", "epoch", "train", "validation", "pause", "resume")
        found = {name: mean(name) for name in names}
        return TrialCost(**found, epochs=params.get("trainer.max_epochs", epochs))


def features(params: dict[str, Any], space: Space) -> dict[str, Any]:
    """The hyperparameters that decide what a trial takes: numbers scaled to 0..1, dropout as whether there is any."""
    found: dict[str, Any] = {}
    for name, distribution in space.items():
        if any(name == free or name.startswith(f"{free}.") for free in FREE):
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
    space = sets.space
    chosen, rest = [sets.params[0]], list(sets.params[1:])
    near = [distance(features(params, space), features(chosen[0], space)) for params in rest]
    while rest and len(chosen) < count:
        at = int(np.argmax(near))
        chosen.append(rest.pop(at))
        near.pop(at)
        mine = features(chosen[-1], space)
        near = [min(old, distance(features(p, space), mine)) for old, p in zip(near, rest, strict=True)]
    return chosen
