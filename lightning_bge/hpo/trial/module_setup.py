"""The setup of a trial of a module that is not ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bge.hpo.trial.setup import TrialSetup
from lightning_bge.runtime.compat.lightning import begin_epoch_anew
from lightning_bge.runtime.random_state import random_state, set_random_state

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
        """Add the state."""
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
