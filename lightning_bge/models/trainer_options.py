"""Options of Lightning's Trainer that it refuses for a module that steps by itself, and what they mean here."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lightning_bge.errors import ConfigError
from lightning_bge.models.optimizer import OptimizerConfig
from lightning_bge.runtime.log_once import log_once

log = logging.getLogger(__name__)

DEFAULT_NORM = OptimizerConfig.max_grad_norm
CLIPPING = "trainer.gradient_clip_val"
ACCUMULATION = "trainer.accumulate_grad_batches"


@dataclass(frozen=True)
class TrainerOptions:
    """Clipping and accumulation as the Trainer's arguments say it.

    Attributes:
        gradient_clip_val: the largest norm of the gradients; 0 switches clipping off, None leaves it to the module.
        gradient_clip_algorithm: None or norm.
        accumulate_grad_batches: how many batches of `data.batch_size` rows make an optimizer step.

    Raises:
        ConfigError: an option has a value that has no meaning here.
    """

    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None
    accumulate_grad_batches: int = 1

    def __post_init__(self) -> None:
        algorithm = self.gradient_clip_algorithm
        if algorithm not in (None, "norm"):
            raise ConfigError(
                f"trainer.gradient_clip_algorithm: expected norm, got {getattr(algorithm, 'value', algorithm)}: the "
                "norm of all gradients is clipped. Leave it out"
            )
        if self.gradient_clip_val is not None and not self.gradient_clip_val >= 0:
            raise ConfigError(f"{CLIPPING}: expected 0 or more, or null, got {self.gradient_clip_val}")
        if type(self.accumulate_grad_batches) is not int or self.accumulate_grad_batches < 1:
            raise ConfigError(f"{ACCUMULATION}: expected 1 or more, got {self.accumulate_grad_batches}")

    @classmethod
    def of(cls, given: Trainer | Mapping[str, Any]) -> "TrainerOptions":
        """Those of a trainer, or of the arguments of one."""
        source = given if isinstance(given, Mapping) else vars(given)
        named = {name: source.get(name) for name in cls.__dataclass_fields__}
        return cls(**{name: value for name, value in named.items() if value is not None})

    def max_grad_norm(self, configured: float | None) -> float | None:
        """The norm to which gradients are clipped; None: they are not.

        Args:
            configured: `model.optimizer.max_grad_norm`. Its default gives way, with a line in the log.

        Raises:
            ConfigError: that is another norm, which is not the default.
        """
        if self.gradient_clip_val is None:
            return configured
        norm = float(self.gradient_clip_val) or None
        if configured not in (norm, DEFAULT_NORM):
            raise ConfigError(
                f"{CLIPPING}={self.gradient_clip_val} and model.optimizer.max_grad_norm={configured} contradict each "
                "other: set one of them, or both to one value (0 of the first is null of the second)"
            )
        if configured != norm:
            text = "gradients are not clipped" if norm is None else f"gradients are clipped to a norm of {norm:g}"
            log_once(log, logging.INFO, f"{CLIPPING}={self.gradient_clip_val}: {text}, in place of {configured:g}")
        return norm

    def check_data(self, datamodule: LightningDataModule | None) -> None:
        """Raise `ConfigError` where batches are to be accumulated that a data module does not make."""
        if self.accumulate_grad_batches == 1:
            return
        if not hasattr(datamodule, "accumulated"):
            made = "a loader" if datamodule is None else type(datamodule).__name__
            raise ConfigError(
                f"{ACCUMULATION}: expected 1 without a TextDataModule, got {self.accumulate_grad_batches}: each batch "
                f"of {made} is one optimizer step. Make its batches larger"
            )
        size, batches = getattr(datamodule, "batch_size", 0), self.accumulate_grad_batches
        text = f"{ACCUMULATION}={batches}: an optimizer step has {batches} x {size} = {batches * size} rows"
        log_once(log, logging.INFO, text)


class OptionsInEffect(Callback):
    """Gives a trainer's options to module and data module for the length of a fit, and hides them from Lightning.

    Lightning refuses them under manual optimization, and counts steps by `accumulate_grad_batches`.

    Args:
        trainer: about to fit.
        module: its module; `max_grad_norm` is set.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        options, data = TrainerOptions.of(trainer), getattr(trainer, "datamodule", None)
        options.check_data(data)
        norm = options.max_grad_norm(module.max_grad_norm)  # type: ignore[arg-type]
        changes: list[tuple[Any, str, Any]] = [(module, "max_grad_norm", norm)]
        changes += [(trainer, "gradient_clip_val", None), (trainer, "accumulate_grad_batches", 1)]
        if hasattr(data, "accumulated"):
            changes.append((data, "accumulated", options.accumulate_grad_batches))
        self._before = [(part, name, getattr(part, name)) for part, name, _ in changes]
        for part, name, value in changes:
            setattr(part, name, value)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore what was there before."""
        for part, name, value in self._before:
            setattr(part, name, value)
        self._before = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As `teardown`, which Lightning does not call after an exception."""
        self.teardown(trainer, pl_module, "exception")
