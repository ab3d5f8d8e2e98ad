"""Which of Lightning's callbacks can serve where, and which of them change what is trained."""

import importlib
from collections.abc import Sequence
from typing import Any, cast

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelPruning,
    ModelSummary,
    ProgressBar,
    SpikeDetection,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)

from lightning_bge.errors import ConfigError
from lightning_bge.runtime.compat.lightning import lightning_bases

Given = Callback | Sequence[Callback] | None

# those that write or show, and change no weight
OBSERVERS = (Checkpoint, LearningRateMonitor, DeviceStatsMonitor, ModelSummary, ProgressBar)
# those that need what `fit` alone has: checkpoints, a logger, all metrics after each epoch
NEEDS_FIT = (Checkpoint, LearningRateMonitor, DeviceStatsMonitor, EarlyStopping)
# those that can't work with a module that steps by itself and is built after their hook `setup`, and the remedy
UNUSABLE: dict[type, str] = {
    LearningRateFinder: "a schedule sets the learning rate. Leave it out, and search model.optimizer.lr with hpo",
    BatchSizeFinder: "it would change the batch of an optimizer step. Leave it out: data.batching.max_tokens=auto "
    "finds the largest micro-batch",
    GradientAccumulationScheduler: "gradients are accumulated over micro-batches. Leave it out, and set "
    "data.batch_size to the rows of an optimizer step",
    BaseFinetuning: "the encoder is loaded after its setup. Leave it out, and set model.frozen_layers",
    ModelPruning: "the encoder is loaded after its setup. Leave it out",
    StochasticWeightAveraging: "it copies the model before the encoder is loaded, so that nothing would be averaged, "
    "and replaces the schedule of the learning rate. Leave it out, and take WeightAveraging or EMAWeightAveraging",
    SpikeDetection: "no loss is returned by a step. Leave it out: model.optimizer.max_grad_norm limits gradients",
}
# those that a study's trials do not have
NOT_IN_TRIALS = (*NEEDS_FIT, *UNUSABLE)
# those for which a command that only evaluates has no use
NEEDS_TRAINING = (
    *NOT_IN_TRIALS,
    *(Timer, WeightAveraging),
)


def callback_list(callbacks: Given) -> list[Callback]:
    """The callbacks of a trainer's argument."""
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, list | tuple) else [cast(Callback, callbacks)]


def is_kind(found: type, kinds: tuple[type, ...]) -> bool:
    """Whether a class is one of Lightning's callbacks, or derived from one.

    By name, as the package `pytorch_lightning` has classes of its own.
    """
    return issubclass(found, kinds) or not lightning_bases(found).isdisjoint(kind.__name__ for kind in kinds)


def check_usable(callbacks: Sequence[Callback]) -> None:
    """Raise `ConfigError` for a callback that can't work with this program's module."""
    for callback in callbacks:
        for kind, fix in UNUSABLE.items():
            if is_kind(type(callback), (kind,)):
                raise ConfigError(f"trainer.callbacks: {type(callback).__name__} can't be used, as {fix}")


def without_kinds(callbacks: Given, kinds: tuple[type, ...]) -> list[Callback]:
    """The callbacks that are of none of these kinds."""
    return [callback for callback in callback_list(callbacks) if not is_kind(type(callback), kinds)]


def acting_callbacks(options: Any, kinds: tuple[type, ...] = OBSERVERS) -> list[Any]:
    """The callbacks of options as plain data (`class_path`, `init_args`) that are of none of these kinds."""
    given = [options] if isinstance(options, dict) else options or []
    return [one for one in given if not (isinstance(one, dict) and is_kind(_class(one), kinds))]


def _class(option: dict[str, Any]) -> type:
    module, _, name = str(option.get("class_path", "")).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):  # of a package that is not installed here: it may do anything
        return object
