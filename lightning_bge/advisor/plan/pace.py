"""The pace of training: what each part of a short real run takes, with its own trainer, model and data."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.trial.objective import ReleaseEncoder, TrialSetup
from lightning_bge.runtime.clock import wait_for
from lightning_bge.runtime.memory import release

_clock = time.perf_counter


class Step(NamedTuple):
    """One optimizer step, or one micro-batch of a validation.

    Attributes:
        seconds: from the batch's start to its end, the device waited for at both (CUDA).
        wait: seconds between the end of the batch before and this one's start; 0 for the first of an epoch or of a
            validation, whose wait is in the seconds of starting.
        sequences: in the batch.
        tokens: real ones; padding does not count.
        micro_batches: that the batch was cut into.
    """

    seconds: float
    wait: float
    sequences: int
    tokens: int
    micro_batches: int


@dataclass(frozen=True)
class Pace:
    """What the parts of a short run took, in seconds of the clock on the wall.

    Attributes:
        warmup: the first steps, which are slower: caches, the allocator, the optimizer's state.
        steps: those measured, in order.
        build: reading the model, or resetting a warm one.
        start: from the start of `fit` to the first batch, without `build`: loaders, optimizer, getting that batch.
        end: of `fit`, from the last batch (or the end of validation) on.
        validation: each batch of the validation.
        validation_rest: the rest of the validation: its start, its metrics.
    """

    warmup: tuple[Step, ...]
    steps: tuple[Step, ...]
    build: float
    start: float
    end: float
    validation: tuple[Step, ...]
    validation_rest: float

    @cached_property
    def tokens(self) -> int:
        """Real tokens of the measured steps."""
        return sum(step.tokens for step in self.steps)

    @cached_property
    def seconds(self) -> float:
        """Of the measured steps, with the waits between them."""
        return sum(step.seconds + step.wait for step in self.steps)

    @property
    def step_seconds(self) -> float:
        """Mean of a measured step and the wait before it."""
        return self.seconds / len(self.steps)

    @property
    def tokens_per_s(self) -> float:
        """Real tokens trained in a second."""
        return self.tokens / self.seconds


class PaceMeter(Callback):
    """Notes when each batch of training and validation starts and ends; the device is waited for there.

    It may be used for several `fit`s, one after the other; call `begin` before each.

    Args:
        warmup: the first so many steps are kept apart.
    """

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.begin()

    def begin(self) -> None:
        """The clock starts: `fit` is about to be called."""
        self.began = _clock()
        self.build = 0.0
        self.ready: float | None = None  # training starts: everything is built
        self.first: float | None = None  # start of the first batch
        self.ended: float | None = None
        self.steps: list[Step] = []
        self.validation: list[Step] = []
        self.validations, self.validating = 0, 0.0  # how many, and seconds of all
        self.last = self.began  # end of the last batch or validation
        self._since = self._before = 0.0
        self._waited: float | None = None  # since when the next batch is waited for

    def timed(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """The same loader, its seconds counted as building."""

        def timed_load(*args: Any, **options: Any) -> Any:
            since = _clock()
            try:
                return load(*args, **options)
            finally:
                self.build += _clock() - since

        return timed_load

    def pace(self) -> Pace:
        """What was measured; call it when `fit` has returned.

        Raises:
            ConfigError: no step was left to be measured.
        """
        end = _clock()
        if len(self.steps) <= self.warmup:
            raise ConfigError(
                f"an epoch has {len(self.steps)} optimizer steps, {self.warmup} of them to warm up, so that none is "
                "left to be measured: use more rows, or a smaller data.batch_size"
            )
        assert self.first is not None
        tested = sum(step.seconds + step.wait for step in self.validation)
        return Pace(
            warmup=tuple(self.steps[: self.warmup]),
            steps=tuple(self.steps[self.warmup :]),
            build=self.build,
            start=self.first - self.began - self.build,
            end=end - self.last,
            validation=tuple(self.validation),
            validation_rest=self.validating - tested,
        )

    # ------------------------------------------------------------------ what Lightning calls

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is built."""
        self.ready = _now(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first batch's wait is not counted as one."""
        self._waited = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins."""
        self._start(pl_module)
        if self.first is None:
            self.first = self._since

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step is done."""
        self.steps.append(self._step(pl_module, batch))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation begins."""
        self._before, self._waited = _now(pl_module), None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """One of its batches begins."""
        self._start(pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """One of its batches is done."""
        self.validation.append(self._step(pl_module, batch))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The validation is done, its metrics computed."""
        self.last = _now(pl_module)
        self.validations, self.validating = self.validations + 1, self.validating + self.last - self._before
        self._waited = None

    def on_test_batch_start(self, *args: Any) -> None:
        """As in a validation."""
        self.on_validation_batch_start(*args)

    def on_test_batch_end(self, *args: Any) -> None:
        """As in a validation."""
        self.on_validation_batch_end(*args)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The run was cut off: the trial pauses."""
        self.ended = _clock()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The run is over."""
        self.ended = _clock()

    def _start(self, module: LightningModule) -> None:
        self._since = _now(module)

    def _step(self, module: LightningModule, batch: Any) -> Step:
        now = self.last = _now(module)
        wait = 0.0 if self._waited is None else self._since - self._waited
        self._waited = now
        return Step(now - self._since, wait, batch.size, batch.tokens, len(batch.micro))


def measure_pace(
    setup: TrialSetup, steps: int, warmup: int = 1, val_batches: int = 0, callbacks: Sequence[Callback] = ()
) -> Pace:
    """Train a fresh setup for a few optimizer steps with its own trainer, and say what each part took.

    The steps are those that training begins with, of one epoch at most. The setup is spent afterwards, and must not
    be trained on.

    Args:
        setup: model, data and trainer; nobody has trained with them.
        steps: optimizer steps to measure; fewer where an epoch has fewer.
        warmup: steps before, which are not measured but kept apart; 1, as the first one makes what later ones reuse.
        val_batches: micro-batches of the validation that follows, the longest sequences first; 0: there is none.
        callbacks: further ones, such as `CompileLayers` or a `TorchBackends` with other settings.

    Raises:
        ConfigError: steps or warmup are out of range, or an epoch has no step besides the warm-up.
    """
    if steps < 1 or warmup < 0 or val_batches < 0:
        raise ConfigError(
            f"expected steps >= 1, warmup >= 0, val_batches >= 0, got {steps=}, {warmup=}, {val_batches=}"
        )
    meter = PaceMeter(warmup)
    # the meter last: what other callbacks do when a batch starts is no part of the step
    trainer = setup.make_trainer(
        callbacks=[*callbacks, ReleaseEncoder(), meter],
        limit_train_batches=warmup + steps,
        limit_val_batches=val_batches,
        max_epochs=1,
    )
    setup.model.load_encoder_with(meter.timed(setup.model.load))
    meter.begin()
    try:
        trainer.fit(setup.model, datamodule=setup.datamodule)
        return meter.pace()
    finally:
        release(host=False)  # trainer and module hold each other until the garbage collector has run


def _now(module: LightningModule) -> float:
    wait_for(module.device)
    return _clock()
