"""A callback that times each optimizer step and each batch of a validation."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bge.runtime.clock import wait_for

_clock = time.perf_counter


class Step(NamedTuple):
    """One optimizer step, or one batch of a validation.

    Attributes:
        seconds: from the start of the batch to its end, with the device synchronized at both (CUDA).
        wait: seconds from the end of the batch before to the start of this one; 0 for the first batch of an epoch or
            of a validation, whose wait is a part of starting it.
        tokens: real tokens of the batch, without padding.
    """

    seconds: float
    wait: float
    tokens: int


def seconds_of(steps: Sequence[Step]) -> float:
    """Seconds of these steps, with the waits between them."""
    return math.fsum(step.seconds + step.wait for step in steps)


def tokens_of(steps: Sequence[Step]) -> int:
    """Tokens of these steps."""
    return sum(step.tokens for step in steps)


class StepTimer(Callback):
    """Times the batches of training, validation and test; for several calls of `fit`, call `start` before each.

    Attributes:
        began: time of `start`.
        ready: time at which training started, everything being built; None: it did not.
        first: start of the first training batch, or None.
        last: end of the last batch or validation.
        ended: end of `fit`, or of its exception, or None.
        steps: optimizer steps.
        validation: batches of validations and of the test.
        validations: number of validations.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Forget what was measured; `fit` is about to be called."""
        self.began = self.last = self._since = _clock()
        self.ready: float | None = None
        self.first: float | None = None
        self.ended: float | None = None
        self.steps: list[Step] = []
        self.validation: list[Step] = []
        self.validations = 0
        self._waited: float | None = None  # since when the next batch is waited for

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is built."""
        self.ready = _now(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The wait for the first batch is not counted as one."""
        self._waited = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A step begins."""
        self._since = _now(pl_module)
        if self.first is None:
            self.first = self._since

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """A step has ended."""
        self.steps.append(self._step(pl_module, batch))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The wait for the first batch is not counted as one."""
        self._waited = None

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A batch begins."""
        self._since = _now(pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """A batch has ended."""
        self.validation.append(self._step(pl_module, batch))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The validation has ended, and its metrics are computed."""
        self.last = _now(pl_module)
        self.validations += 1
        self._waited = None

    def on_test_batch_start(self, *args: Any) -> None:
        """As in a validation."""
        self.on_validation_batch_start(*args)

    def on_test_batch_end(self, *args: Any) -> None:
        """As in a validation."""
        self.on_validation_batch_end(*args)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The trial was paused or has failed."""
        self.ended = _clock()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The call of `fit` or `test` ends."""
        self.ended = _clock()

    def _step(self, module: LightningModule, batch: Any) -> Step:
        now = self.last = _now(module)
        wait = 0.0 if self._waited is None else self._since - self._waited
        self._waited = now
        return Step(now - self._since, wait, batch.tokens)


def _now(module: LightningModule) -> float:
    wait_for(module.device)
    return _clock()
