"""The setup of a trial of `BGEClassifier` and `TextDataModule`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bge.callbacks.compile.callback import CompileLayers
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.hpo.trial.setup import TrialSetup
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.models.metrics.predictions import Predictions


@dataclass(frozen=True)
class TextTrialSetup(TrialSetup):
    """As `TrialSetup`; the model is not yet built: it loads its encoder when it is first trained.

    Attributes:
        model: the classifier.
        datamodule: set up for `fit`.
    """

    model: BGEClassifier
    datamodule: TextDataModule

    @property
    def steps_per_epoch(self) -> int:
        """Effective batches of the selected rows."""
        return -(-len(self.datamodule.train_rows) // self.datamodule.rows_per_step)

    @property
    def n_validation_rows(self) -> int:
        """Of the selected fold."""
        return len(self.datamodule.val_rows)

    @property
    def resumes_within_epochs(self) -> bool:
        """Its loaders do."""
        return True

    def begin_fold(self, fold: int, earlier: Sequence[Predictions]) -> None:
        """Select the rows of a fold, and the threshold of its validations by the folds before."""
        self.datamodule.select_fold(fold)
        if earlier:
            self.model.tune_threshold_on(Predictions.collect(list(earlier)))

    def first_callbacks(
        self, compile_config: CompileConfig, encoder: EncoderCache, steps_left: int | None
    ) -> list[Callback]:
        """Load the encoder from the cache; compile its layers where that pays for the steps that are left."""
        self.model.load_encoder_with(encoder.load)
        return [CompileLayers(compile_config, steps_left=steps_left)]

    def last_callbacks(self) -> list[Callback]:
        """Leave the encoder to the next trial."""
        return [ReleaseEncoder()]


TextBuild = Callable[[dict[str, Any]], TextTrialSetup]  # as `Build`


class ReleaseEncoder(Callback):
    """Takes the encoder out of the module, and the optimizer out of the trainer, when training ends.

    Lightning would copy both to the host: the optimizer's state alone is 0.9 GB where 110 M parameters train.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training has ended as planned."""
        pl_module.release_encoder()  # type: ignore[operator]
        trainer.strategy.optimizers = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The trial was pruned, has failed or was interrupted."""
        self.on_train_end(trainer, pl_module)
