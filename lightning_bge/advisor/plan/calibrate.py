"""What the trials of a search take on this machine: a few of them are measured, and taken to their real size.

Steps and validations grow with their tokens; what surrounds them stays as it is.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

import numpy as np

from lightning_bge.advisor.plan.cost_model import TrialCost
from lightning_bge.advisor.plan.pace import Step
from lightning_bge.advisor.plan.trial_bench import Bench, Sizes, Visit, seconds_of
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.space.parameter_sets import ends
from lightning_bge.hpo.space.search_space import Space

# Settings that change what a step computes, but not how long it takes.
FREE = (
    *(f"model.optimizer.{name}" for name in ("lr", "weight_decay", "beta1", "beta2", "eps", "layer_decay")),
    *("model.loss", "model.schedule", "model.seed", "trainer.max_epochs"),
)
MOST_DRAWS = 8
MOST_STEPS = 20  # of a short epoch
# Distinct micro-batches that oneDNN keeps kernels ready for: 1,024 in all, some 15 for each shape of a layer's inputs.
# All trials meet the same batches, so that with fewer of them only the first trial finds them new, and takes longer.
FEW_SHAPES = 64
SHARE = 0.75  # of the time is for the draws; the rest for the end of a study
NEAR = 0.1  # draws that differ in no setting count 100 times as much as those that differ in one

_clock = time.perf_counter


@dataclass(frozen=True)
class Draw:
    """One point of the space, measured.

    Attributes:
        params: its settings.
        features: those of them that decide what it takes, as numbers from 0 to 1, or as they are.
        cost: of a whole trial with them.
        step_s: seconds of an optimizer step.
        token_s: seconds of a token in training.
        error: standard error of the steps' seconds, as a share.
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
        draws: the points that were measured.
        start: a process's start, up to its first trial.
        first: what the first trial of a process takes more than others.
        finish: the study's end, without the steps of the refit: reading, exporting, writing, scoring the test file.
        refit_epoch: the steps of an epoch on all rows.
        read: reading the model from disk more than resetting a warm one.
        steps: optimizer steps of an epoch, on average over the draws.
        missing: points that ran out of memory, besides those measured.
        took: seconds that all this took to measure; 0: figures given by hand.
    """

    draws: tuple[Draw, ...]
    start: float = 0.0
    first: float = 0.0
    finish: float = 0.0
    refit_epoch: float = 0.0
    read: float = 0.0
    steps: float = 0.0
    missing: int = 0
    took: float = 0.0

    @property
    def error(self) -> float:
        """Standard error of the training's seconds, as a share."""
        return math.sqrt(math.fsum(draw.error**2 for draw in self.draws)) / len(self.draws)

    @property
    def step_s(self) -> float:
        """Mean seconds of an optimizer step: draws with more of them count for more."""
        return fmean(draw.cost.train for draw in self.draws) / self.steps

    def cost(self, params: dict[str, Any], space: Space, epochs: int) -> TrialCost:
        """What a trial with these settings takes: as the measured draws that are most like it.

        Args:
            params: its settings.
            space: the search space.
            epochs: of a fold, where they are not searched.
        """
        mine = features(params, space)
        weights = [1 / (distance(mine, draw.features) + NEAR) ** 2 for draw in self.draws]

        def mean(name: str) -> float:
            return sum(w * getattr(d.cost, name) for w, d in zip(weights, self.draws, strict=True)) / sum(weights)

        names = ("visit", "fold", "epoch", "train", "validation", "pause", "resume")
        found = {name: mean(name) for name in names}
        return TrialCost(**found, epochs=params.get("trainer.max_epochs", epochs))


# ---------------------------------------------------------------------- which draws


def features(params: dict[str, Any], space: Space) -> dict[str, Any]:
    """The settings that decide what a trial takes: numbers as 0 to 1 over their range, dropout as yes or no."""
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
    """How much two trials differ in what decides their cost: 1 for each setting that is another altogether."""
    total = 0.0
    for name, value in one.items():
        if _is_number(value) and _is_number(other[name]):
            total += abs(value - other[name])
        else:
            total += value != other[name]
    return total


def choose_draws(points: Sequence[dict[str, Any]], space: Space, count: int) -> list[dict[str, Any]]:
    """So many of the points, each as unlike those before it as there is one; the first one stays the first."""
    chosen, rest = [points[0]], list(points[1:])
    near = [distance(features(point, space), features(points[0], space)) for point in rest]
    while rest and len(chosen) < count:
        at = int(np.argmax(near))
        chosen.append(rest.pop(at))
        near.pop(at)
        mine = features(chosen[-1], space)
        near = [min(old, distance(features(p, space), mine)) for old, p in zip(near, rest, strict=True)]
    return chosen


# ---------------------------------------------------------------------- measuring


def calibrate(bench: Bench, points: Sequence[dict[str, Any]], space: Space, epochs: int, seconds: float) -> Calibration:
    """Measure some of the points, and the end of a study.

    Args:
        bench: runs them.
        points: of the search, as its trials may have them.
        space: the search space.
        epochs: of a fold, where they are not searched.
        seconds: about how long it may take; two draws are made in any case, where one has not taken longer already.

    Raises:
        ConfigError: no draw fits into memory.
    """
    since = _clock()
    gc.collect()
    gc.freeze()  # as a search does
    try:
        chosen = choose_draws(points, space, MOST_DRAWS)
        draws, missing = _measure(bench, chosen, space, epochs, SHARE * seconds, seconds)
    finally:
        gc.unfreeze()
    if not draws:
        raise ConfigError(f"none of {missing} points of the space fits into memory: see what `fit` says of them")
    rate = fmean(draw.rate for draw in draws)
    validation = fmean(draw.validation_rate for draw in draws)
    finish = bench.finish()
    # without the refit's steps, but for what the first one takes more than others; and with the whole test file
    first, *others = bench.meter.steps or [Step(0.0, 0.0, 0, 0, 0)]
    finish -= rate * first.tokens + seconds_of(others) + seconds_of(bench.meter.validation)
    finish += validation * bench.test_tokens()
    visits = [visit for draw in draws for visit in (*draw.first, *draw.again)]
    warm = [visit for visit in visits if not visit.read]
    reset = fmean(visit.load for visit in warm) if warm else 0.0
    reads = [visit.load for visit in visits if visit.read]
    return Calibration(
        draws=tuple(draw.priced(draws, space, epochs, reset) for draw in draws),
        first=_first(draws, reset, epochs),
        finish=max(0.0, finish),
        refit_epoch=rate * fmean(draw.sizes.all for draw in draws) * bench.refit,
        read=max(0.0, fmean(reads) - reset) if reads else 0.0,
        steps=fmean(draw.sizes.steps for draw in draws),
        missing=missing,
        took=_clock() - since,
    )


def _measure(
    bench: Bench, chosen: Sequence[dict[str, Any]], space: Space, epochs: int, seconds: float, most: float
) -> tuple[list[Measured], int]:
    """Draw after draw for about so many seconds; and how many of them ran out of memory."""
    since, took, missing = _clock(), 0.0, 0
    draws: list[Measured] = []
    for params in chosen:
        began = _clock()
        if draws and began - since + took > (seconds if len(draws) > 1 else most):
            break
        data = bench.build(params).datamodule
        sizes, visits = Sizes.of(data), bench.draw(params)
        again = bench.draw(params) if visits and sizes.steps * epochs * data.num_folds <= FEW_SHAPES else ()
        took = _clock() - began
        if not visits:
            missing += 1
            continue
        draws.append(Measured(params, sizes, visits, again, data.num_folds))
        if len(draws) == 1:  # now it is known what steps take
            bench.steps = draws[0].short_epoch(took, (seconds - took) / (max(3, kinds(chosen, space)) - 1))
    return draws, missing


def tokens_of(steps: Sequence[Step]) -> int:
    """All of them."""
    return sum(step.tokens for step in steps)


def kinds(points: Sequence[dict[str, Any]], space: Space) -> int:
    """Number of points that differ in what decides their cost."""
    return len({repr(features(point, space)) for point in points})


@dataclass(frozen=True)
class Measured:
    """One draw: its settings, the real sizes of its data, its visits, and those of the same trial once more.

    The second ones tell what a trial takes where there are any, the first ones what the first trial takes more.
    """

    params: dict[str, Any]
    sizes: Sizes
    first: tuple[Visit, ...]
    again: tuple[Visit, ...] = ()
    folds: int = 1

    @property
    def visits(self) -> tuple[Visit, ...]:
        """Those of a trial as most of them are."""
        return self.again or self.first

    @cached_property
    def timed(self) -> list[Step]:
        """The steps that tell the pace: all but the first one of each visit."""
        return [step for visit in self.visits for step in visit.steps[1:]]

    @cached_property
    def rate(self) -> float:
        """Seconds of a token in training."""
        return seconds_of(self.timed) / tokens_of(self.timed)

    def new_batches(self, epochs: int) -> float:
        """Seconds that a whole trial takes more whose batches are all new to this process."""
        steps = [step for visit in self.first for step in visit.steps[1:]] if self.again else []
        more = seconds_of(steps) / tokens_of(steps) - self.rate if steps else 0.0
        return max(0.0, more) * self.sizes.train * epochs * self.folds

    @cached_property
    def validation_rate(self) -> float:
        """Seconds of a token in validation."""
        batches = [batch for visit in self.visits for batch in visit.validation]
        return seconds_of(batches) / tokens_of(batches)

    @property
    def error(self) -> float:
        """Standard error of `rate`, as a share; of a single step it is taken to be a tenth."""
        off = [step.seconds + step.wait - self.rate * step.tokens for step in self.timed]
        return stdev(off) * math.sqrt(len(off)) / seconds_of(self.timed) if len(off) > 1 else 0.1

    def extra(self, visit: Visit) -> float:
        """What a visit's first step takes more than others."""
        return visit.steps[0].seconds - self.rate * visit.steps[0].tokens

    def short_epoch(self, took: float, wanted: float) -> int:
        """Steps of an epoch that let the next draws take about so many seconds."""
        steps = [step for visit in (*self.first, *self.again) for step in visit.steps]
        each = seconds_of(self.timed) / len(self.timed)
        epochs = sum(visit.epochs for visit in (*self.first, *self.again))
        return max(2, min(MOST_STEPS, len(steps) // epochs + int((wanted - took) / each / epochs)))

    def priced(self, all: Sequence[Measured], space: Space, epochs: int, reset: float) -> Draw:
        """Its whole trial; what a process does once is left out of the first one's parts, by taking the others'."""
        others = [draw for draw in all[1:]] if self is all[0] and len(all) > 1 else [self]
        parts = [draw.parts(reset, cold=draw is all[0]) for draw in others]
        cost = TrialCost(
            **{name: fmean(part[name] for part in parts) for name in parts[0]},
            train=self.rate * self.sizes.train,
            validation=self.validation_rate * self.sizes.validation,
            epochs=self.params.get("trainer.max_epochs", epochs),
        )
        step_s = cost.train / self.sizes.steps
        return Draw(self.params, features(self.params, space), cost, step_s, self.rate, self.error)

    def parts(self, reset: float, cold: bool) -> dict[str, float]:
        """Seconds of what surrounds steps and validations.

        Args:
            reset: of a warm model.
            cold: the first visit is the first one of its process.
        """
        warm = self.visits[1:] if cold and not self.again and len(self.visits) > 1 else self.visits
        fresh, last = warm[0], self.visits[-1]
        paused = self.visits[0].end if len(self.visits) > 1 else 0.0
        return {
            "visit": fmean(visit.outer for visit in warm),
            # the micro-batch size may be searched in the first one; later ones find it in its cache
            "fold": fresh.build + reset + min(v.start for v in warm) + fmean(self.extra(v) for v in warm) + last.end,
            "epoch": last.between,
            "pause": paused,
            "resume": max(0.0, last.build - fresh.build),
        }


def _first(draws: Sequence[Measured], reset: float, epochs: int) -> float:
    """What the first trial of a process takes more than a later one; reading each model once is in it."""
    first, later = draws[0].first[0], draws[1].visits[0] if len(draws) > 1 else draws[0].visits[-1]
    owner = draws[1] if len(draws) > 1 else draws[0]
    more = first.outer - later.outer + first.build - later.build + draws[0].extra(first) - owner.extra(later)
    reads = sum(visit.load - reset for draw in draws for visit in (*draw.first, *draw.again) if visit.read)
    return max(0.0, more) + max(0.0, reads) + draws[0].new_batches(epochs)
