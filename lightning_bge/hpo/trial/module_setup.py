"""The setup of a trial of a module that is not ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bge.hpo.trial.setup import TrialSetup
from lightning_bge.runtime.compat.lightning import begin_epoch_anew
from lightning_bge.runtime.compat.torch import tree_leaves
from lightning_bge.runtime.log_once import log_once
from lightning_bge.runtime.random_state import random_state, set_random_state

log = logging.getLogger("lightning_bge")

RANDOM_STATE = "lightning_bge_random_state"  # key of a checkpoint
HYPERPARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")  # keys of Lightning's


@dataclass(frozen=True)
class ModuleTrialSetup(TrialSetup):
    """As `TrialSetup`: what a pause needs of a module that draws from the global random number generators."""

    def last_callbacks(self) -> list[Callback]:
        """Let a checkpoint continue the trial exactly."""
        return [ResumableTrial()]


class SavedRandomState(Callback):
    """Keeps the state of the random number generators in checkpoints.

    A run that goes on from the end of an epoch shuffles and drops out as if it had not been interrupted.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the state, and say what else a checkpoint lacks."""
        for reason in _what_is_lost(trainer):
            log_once(log, logging.WARNING, f"a run that goes on from a checkpoint differs a little: {reason}")
        checkpoint[RANDOM_STATE] = random_state()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the state."""
        self._state = checkpoint.get(RANDOM_STATE)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore it, before the training loader draws the epoch's order from it."""
        if self._state is not None:
            set_random_state(self._state)
            self._state = None
            begin_epoch_anew(trainer)


def _what_is_lost(trainer: Trainer) -> Iterator[str]:
    """What Lightning's checkpoints of an epoch's end do not hold of a run."""
    if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
        yield "ReduceLROnPlateau does not see the epoch at whose end it was written"
    if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        yield "trainer.reload_dataloaders_every_n_epochs makes loaders that draw another order of the rows"
    if any(getattr(loader, "generator", None) is not None for loader in tree_leaves(trainer.train_dataloader)):
        yield "a training loader with a generator of its own draws from its beginning again"


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
