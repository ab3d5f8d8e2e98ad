"""The arithmetic of a study's hours: the seconds of a trial, and what compiling costs and saves.

Steps that are 15 % *shorter* take 0.85 of the time; steps that are 15 % *faster* take 1 / 1.15 = 0.87 of it. Of 1,038
hours the first saves 155.7, the second 135.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lightning_bge.errors import ConfigError
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
