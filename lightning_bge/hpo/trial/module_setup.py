"""The setup of a trial of a module that is not ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_bge.hpo.trial.setup import TrialSetup
from lightning_bge.runtime.compat.lightning import begin_epoch_anew
from lightning_bge.runtime.compat.torch import tree_leaves
from lightning_bge.runtime.log_once import log_once
from lightning_bge.runtime.random_state import random_state, set_random_state

log = logging.getLogger("lightning_bge")

# keys of a checkpoint
RANDOM_STATE, GENERATORS = "lightning_bge_random_state", "lightning_bge_generators"
PLATEAUS = "lightning_bge_plateaus"
HYPERPARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")  # keys of Lightning's


@dataclass(frozen=True)
class ModuleTrialSetup(TrialSetup):
    """As `TrialSetup`: what a pause needs of a module that draws from the global random number generators."""

    def last_callbacks(self) -> list[Callback]:
        """Let a checkpoint continue the trial exactly."""
        return [ResumableTrial()]


class SavedRandomState(Callback):
    """Keeps in checkpoints what Lightning's do not hold: the state of the random number generators.

    A run that goes on from the end of an epoch shuffles and drops out as if it had not been interrupted. Generators of
    the training loaders' own are kept as well, and the value that a `ReduceLROnPlateau` has still to see, which
    Lightning shows it after the checkpoints of an epoch's end are written.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None
        self._generators: list[Tensor] = []
        self._plateaus: dict[int, float] = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the state, and say what else a checkpoint lacks."""
        plateaus = _values_of_plateaus(trainer)
        for reason in _what_is_lost(trainer, plateaus):
            log_once(log, logging.WARNING, f"a run that goes on from a checkpoint differs a little: {reason}")
        checkpoint[RANDOM_STATE] = random_state()
        checkpoint[GENERATORS] = [one.get_state() for one in _generators(trainer)]
        checkpoint[PLATEAUS] = {number: value for number, value in plateaus.items() if value is not None}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the state."""
        self._state = checkpoint.get(RANDOM_STATE)
        self._generators, self._plateaus = checkpoint.get(GENERATORS, []), checkpoint.get(PLATEAUS, {})

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore it, before the training loader draws the epoch's order from it."""
        if self._state is None:
            return
        for number, value in self._plateaus.items():
            pl_module.lr_scheduler_step(trainer.lr_scheduler_configs[number].scheduler, value)
        self._restore_generators(_generators(trainer))
        set_random_state(self._state)
        self._state = None
        begin_epoch_anew(trainer)

    def _restore_generators(self, generators: list[torch.Generator]) -> None:
        if len(generators) != len(self._generators):  # nobody knows which is which
            log_once(
                log,
                logging.WARNING,
                f"a run that goes on from a checkpoint differs a little: the training loaders have {len(generators)} "
                f"generators, and had {len(self._generators)} when it was written",
            )
            return
        for generator, state in zip(generators, self._generators, strict=True):
            generator.set_state(state)


def _generators(trainer: Trainer) -> list[torch.Generator]:
    """Those of torch of the training loaders and their samplers, each once."""
    return [one for one in _own_generators(trainer) if isinstance(one, torch.Generator)]


def _own_generators(trainer: Trainer) -> list[Any]:
    """What the training loaders and their samplers call their generator, each once."""
    found: dict[int, Any] = {}
    for loader in tree_leaves(trainer.train_dataloader):
        batches = getattr(loader, "batch_sampler", None)
        for part in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            if (generator := getattr(part, "generator", None)) is not None:
                found[id(generator)] = generator
    return list(found.values())


def _values_of_plateaus(trainer: Trainer) -> dict[int, float | None]:
    """What each `ReduceLROnPlateau` is shown at the end of the epoch, by its number; None: it is not known yet."""
    found: dict[int, float | None] = {}
    if trainer.is_last_batch:
        for number, config in enumerate(trainer.lr_scheduler_configs):
            due = config.interval == "epoch" and (trainer.current_epoch + 1) % config.frequency == 0
            if config.reduce_on_plateau and due:
                value = trainer.callback_metrics.get(str(config.monitor))
                found[number] = None if value is None else float(value)
    return found


def _what_is_lost(trainer: Trainer, plateaus: dict[int, float | None]) -> Iterator[str]:
    """What checkpoints of an epoch's end do not hold of a run."""
    for number, value in plateaus.items():
        if value is None:
            name = trainer.lr_scheduler_configs[number].monitor
            yield f"ReduceLROnPlateau does not see {name} of the epoch at whose end it was written"
    for generator in _own_generators(trainer):
        if not isinstance(generator, torch.Generator):
            yield f"the state of a sampler's generator, a {type(generator).__name__} that is not torch's, is not kept"
    if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        yield "trainer.reload_dataloaders_every_n_epochs makes loaders that draw another order of the rows"


class ResumableTrial(SavedRandomState):
    """Lets a checkpoint of a trial be continued as if there had been no pause.

    It does not hold the hyperparameters, of which the module is made anew, and which may be objects that
    `torch.load(weights_only=True)` refuses.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave out the hyperparameters where a checkpoint is written: the module's own hook may read them before."""
        write = trainer.strategy.save_checkpoint

        def write_without(checkpoint: dict[str, Any], *args: Any, **options: Any) -> None:
            for name in HYPERPARAMETERS:
                checkpoint.pop(name, None)
            write(checkpoint, *args, **options)

        trainer.strategy.save_checkpoint = write_without  # type: ignore[method-assign]
