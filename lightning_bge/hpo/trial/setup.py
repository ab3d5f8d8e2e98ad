"""What a trial is made of: a module, its data, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.models.metrics.predictions import Predictions


@dataclass(frozen=True)
class TrialSetup:
    """Fresh objects for one trial of any LightningModule.

    Attributes:
        model: the module, which no trainer has seen.
        datamodule: its data; None: the module has loaders of its own.
        make_trainer: called with `callbacks` and any of the trainer's arguments.
        config: returns all options, as plain data that `fit` reads.
    """

    model: LightningModule
    datamodule: LightningDataModule | None
    make_trainer: Callable[..., Trainer]
    config: Callable[[], dict[str, Any]]

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps of an epoch; None: they are not known before the loaders are made."""
        return None

    @property
    def n_validation_rows(self) -> int | None:
        """Rows that are validated on; None: it is not known."""
        return None

    @property
    def resumes_within_epochs(self) -> bool:
        """Whether a checkpoint of the middle of an epoch goes on with the rows that were left.

        Loaders of other projects seldom do; a trial that is stopped there goes on from what was saved before.
        """
        return False

    def begin_fold(self, fold: int, earlier: Sequence[Predictions]) -> None:
        """Select the rows of a fold.

        Args:
            fold: its number, from 0.
            earlier: predictions of the folds before, where modules keep them.
        """
        select = getattr(self.datamodule, "select_fold", None)
        if select is not None:
            select(fold)

    def first_callbacks(
        self, compile_config: CompileConfig, encoder: EncoderCache, steps_left: int | None
    ) -> list[Callback]:
        """Callbacks of the trainer that come before those that report."""
        return []

    def last_callbacks(self) -> list[Callback]:
        """Callbacks of the trainer that come after all others."""
        return []


Build = Callable[[dict[str, Any]], TrialSetup]  # called with options by their dotted names, and `seed_everything`
