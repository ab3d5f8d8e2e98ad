"""The arithmetic of a search: seconds of its parts, hours of the whole, and what each change of them is worth.

Two words are kept apart. Steps that are 15 % *shorter* take 0.85 of the time; steps that are 15 % *faster* take
1 / 1.15 = 0.87 of it. Of 1,038 hours the first saves 155.7, the second 135.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.steps import Steps

How = Literal["shorter", "faster"]
Basis = Literal["measured", "predicted", "in effect", "off", "impossible", "not known"]
HOUR = 3600.0
# hours in the table that the product started from, and what was said to lead to the next ones
ORIGINAL = (("TF32", 800.0, 678.0), ("zero_grad(set_to_none=True)", 678.0, 644.0), ("max-autotune", 644.0, 580.0))
ORIGINAL_PARTS = (250.0, 788.0)  # hours of its unpruned and its pruned trials
ORIGINAL_NET = 122.4  # hours: what compiling saves of the sum of these parts


@dataclass(frozen=True)
class TrialCost:
    """Seconds of one trial's parts.

    Attributes:
        visit: to begin it, or to go on with it once it was paused, besides what follows.
        fold: to start and end a fold: model, optimizer, loaders, and what its first step takes more than others.
        epoch: to start and end an epoch, besides its steps and the batches of its validations.
        train: the steps of one epoch.
        validation: the batches of one validation, and its report.
        pause: to write a checkpoint.
        resume: to read it.
        epochs: that it trains each fold for.
    """

    visit: float
    fold: float
    epoch: float
    train: float
    validation: float
    pause: float = 0.0
    resume: float = 0.0
    epochs: int = 1

    def reports(self, steps: Steps, trained: Sequence[bool] | None = None) -> list[float]:
        """Seconds of each report of a trial that runs to its end.

        Args:
            steps: folds, epochs at most, reports of each epoch. Epochs that the trial does not train cost nothing.
            trained: for each report of a fold after another, whether it is trained for; False: early stopping has left
                it out. None: all are.
        """
        part = self.train / steps.per_epoch + self.validation + self.epoch / steps.per_epoch
        found = []
        for report in range(steps.total):
            within = report % steps.per_fold
            runs = within < self.epochs * steps.per_epoch and (trained is None or trained[report])
            found.append(runs * part + (within == 0) * self.fold)
        return found

    def total(self, steps: Steps) -> float:
        """Seconds of a trial that runs to its end at once."""
        return self.visit + math.fsum(self.reports(steps))


# ---------------------------------------------------------------------- shorter, faster, compiled


def saved(hours: float, gain: float, how: How) -> float:
    """What of these hours is saved where they get shorter, or faster, by this share.

    Raises:
        ConfigError: the share is negative, or so large that nothing would be left.
    """
    if gain < 0 or (how == "shorter" and gain >= 1):
        raise ConfigError(f"a gain is a share from 0 to below 1, got {gain} ({how})")
    return hours * gain if how == "shorter" else hours - hours / (1 + gain)


class Balance(NamedTuple):
    """What compiling costs and saves.

    Attributes:
        overhead: hours of compiling.
        saved: hours of training.
        net: the difference.
        lines: the arithmetic, to be read.
    """

    overhead: float
    saved: float
    net: float
    lines: tuple[str, ...]


def compile_balance(hours: float, times: int, compile_s: float, gain: float, how: How) -> Balance:
    """Whether compiling pays over a whole search.

    Args:
        hours: of training, without compiling.
        times: how often is compiled: once a process where the encoder stays warm, else once a trial.
        compile_s: seconds each time.
        gain: share by which steps get shorter, or faster.
        how: which of the two the share means.
    """
    overhead, won = times * compile_s / HOUR, saved(hours, gain, how)
    rule = f"{gain:.0%} of it" if how == "shorter" else f"{hours:,.1f} h / {1 + gain:g} less"
    lines = (
        f"overhead {times:,} x {compile_s:g} s = {overhead:,.1f} h",
        f"saving   {hours:,.1f} h of training with steps {gain:.0%} {how}: {rule} = {won:,.1f} h",
        f"net      {won:,.1f} h - {overhead:,.1f} h = {won - overhead:,.1f} h",
    )
    return Balance(overhead, won, won - overhead, lines)


def break_even(compile_s: float, step_s: float, gain: float, how: How = "shorter") -> float:
    """Optimizer steps after which compiling has paid; infinite where it saves nothing."""
    each = saved(step_s, gain, how)
    return compile_s / each if each > 0 else math.inf


def needed_gain(compile_s: float, train_s: float) -> float:
    """By what share steps must get shorter for compiling to pay over this much training; above 1: it can't."""
    return compile_s / train_s if train_s > 0 else math.inf


# ---------------------------------------------------------------------- levels


class Level(NamedTuple):
    """One row of the table of levels.

    Attributes:
        name: the optimisation that is added.
        hours: of the whole study with it and all before it.
        how: the arithmetic that leads there from the row before.
        basis: measured, predicted, in effect (its part of the hours is not known apart), off, impossible here, or not
            known, of another machine.
    """

    name: str
    hours: float
    how: str
    basis: Basis


def describe_original() -> list[str]:
    """The table that the product started from, with each level's factor worked out, and where its sums are wrong."""
    lines = []
    for name, before, after in ORIGINAL:
        factor = after / before
        lines.append(
            f"+{name}: {before:.0f} h -> {after:.0f} h, a factor of {after:.0f} / {before:.0f} = {factor:.4f}: "
            f"{1 - factor:.1%} shorter, or {before / after - 1:.1%} faster"
        )
    first, second = ORIGINAL_PARTS
    start = ORIGINAL[0][1]
    lines.append(
        f"its trials take {first:.0f} h + {second:.0f} h = {first + second:,.0f} h, not {start:.0f} h; and "
        f"{start:.0f} h - {ORIGINAL_NET} h, what compiling saves net of {first + second:,.0f} h, is its second figure, "
        f"{start - ORIGINAL_NET:.0f} h"
    )
    return lines


def money(worker_hours: float, price: float) -> float:
    """What machines cost that are paid by the hour, one a worker."""
    return worker_hours * price


def hours(value: float) -> str:
    """Hours as people read them: `41 s`, `12.3 min`, `4.20 h`, `1,038 h`."""
    seconds = abs(value) * HOUR
    if value < 0:
        return f"-{hours(-value)}"
    if seconds < 90:
        return f"{seconds:.3g} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{value:.2f} h" if value < 100 else f"{value:,.0f} h"
