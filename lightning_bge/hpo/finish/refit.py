"""The model that a study ends with: the best hyperparameters trained once more, on all rows, and exported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from optuna.trial import FrozenTrial

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.finish.calibration import check_calibration, output_layer
from lightning_bge.hpo.trial.fold_callbacks import StopOnRequest
from lightning_bge.hpo.trial.outer_fold import save_if_outer_fold
from lightning_bge.hpo.trial.text_setup import TextBuild, TextTrialSetup
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.metrics.names import HAS_THRESHOLD
from lightning_bge.models.output.output_layer import divide_logits
from lightning_bge.models.output.prediction_file import write_predictions
from lightning_bge.runtime.memory import release
from lightning_bge.runtime.stop import StopRequest
from lightning_bge.types import Schema


def check_end(config: StudyConfig, data: TextDataModule, setups: Callable[[], Iterable[TextTrialSetup]]) -> None:
    """Check the options of a study's end before its first trial.

    Args:
        config: the options.
        data: set up for `fit`.
        setups: makes fresh objects for each model that trials may have.

    Raises:
        ConfigError: an option does not go with the data, or with a model.
    """
    if config.ensemble and data.num_folds < 2:
        raise ConfigError("hpo.ensemble: expected false without folds, got true. Set data.split.folds to 2 or more")
    if config.calibration is not None:
        check_calibration(setups())
    if config.refit_val_file and data.val_file is None:
        raise ConfigError("hpo.refit_val_file: expected false without data.val_file, got true. Set data.val_file")


@dataclass(frozen=True, kw_only=True)
class Winner:
    """What a study's exported model is made of.

    Attributes:
        trial: the best one.
        build: makes fresh objects from parameters.
        epochs: of a trial that has not drawn a number of them.
        schema: of the model, with its threshold.
        temperature: by which its logits are divided.
        request: whether to stop the training; None: never.
    """

    trial: FrozenTrial
    build: TextBuild
    epochs: int
    schema: Schema
    temperature: float = 1.0
    request: StopRequest | None = None

    @property
    def params(self) -> dict[str, Any]:
        """The hyperparameters, with the learning-rate schedule of the folds, whenever training stops."""
        schedule = {"model.schedule.epochs": self.trial.params.get("trainer.max_epochs", self.epochs)}
        return self.trial.params | schedule

    @property
    def refit_epochs(self) -> int:
        """The mean of the epochs that were scored in the folds."""
        return max(1, round(float(np.mean(self.trial.user_attrs["fold_epochs"]))))

    def fit(self, setup: TextTrialSetup, epochs: int) -> Trainer:
        """Train the model on the selected rows for so many epochs, without a validation; scale its logits."""
        callbacks = [] if self.request is None else [StopOnRequest(self.request)]
        one = {"devices": 1, "strategy": "auto"}  # where trials have several, the others wait
        trainer = setup.make_trainer(callbacks=callbacks, max_epochs=epochs, limit_val_batches=0, **one)
        trainer.fit(setup.model, datamodule=setup.datamodule)
        assert setup.model.schema is not None
        if self.temperature != 1:
            assert setup.model.net is not None
            divide_logits(output_layer(setup.model.net, setup.datamodule), self.temperature)
        setup.model.set_schema(replace(setup.model.schema, threshold=self.schema.threshold))
        return trainer


def refit(winner: Winner, config: StudyConfig, run_dir: Path) -> dict[str, Any]:
    """Train with the best hyperparameters on all rows; export the model; score the test file.

    Args:
        winner: the best trial.
        config: whether the rows of the validation file are trained on.
        run_dir: the run's folder.

    Returns:
        What it adds to the summary: `model_dir`, `refit`, and `test` where there is a test file.

    Raises:
        Stopped: as requested; the next call begins anew.
    """
    setup = winner.build(winner.params)
    model, data = setup.model, setup.datamodule
    try:
        found: dict[str, Any] = {"refit": _describe(winner, config, setup)}
        if config.refit_val_file:
            data.add_validation_rows()
        else:
            data.select_fold(None)
        trainer = winner.fit(setup, winner.refit_epochs)
        found["model_dir"] = str(model.export(run_dir / "model", data.new_tokenizer()))
        if data.has_test_rows:
            trainer.test(model, datamodule=data, verbose=False)
            found["test"] = write_test(run_dir, model, trainer)
            save_if_outer_fold(run_dir, data, model.predictions, model.loss)
    finally:
        release(host=False)
    return found


def write_test(run_dir: Path, model: BGEClassifier, trainer: Trainer) -> dict[str, float]:
    """Write `test.csv` after `trainer.test`; return the metrics of the test file."""
    assert model.schema is not None
    assert model.predictions is not None
    write_predictions(run_dir / "test.csv", model.schema, model.predictions)
    return {name.removeprefix("test_"): float(value) for name, value in trainer.callback_metrics.items()}


def _describe(winner: Winner, config: StudyConfig, setup: TextTrialSetup) -> dict[str, Any]:
    """What is trained on, and how, before any row is added."""
    data, left_out = setup.datamodule, 0
    if data.val_file is not None:
        data.select_fold(0)
        left_out = len(data.val_rows)
    return {
        "train_file_rows": data.num_train_rows,
        "val_file_rows": left_out if config.refit_val_file else 0,
        "outer_fold_rows_left_out": len(data.outer_rows),
        "val_file_rows_left_out": 0 if config.refit_val_file else left_out,
        "epochs": winner.refit_epochs,
        "fold_epochs": winner.trial.user_attrs["fold_epochs"],
        "schedule": describe_schedule(setup, winner.refit_epochs),
        **describe_threshold(winner, setup),
    }


def describe_schedule(setup: TextTrialSetup, epochs: int) -> dict[str, Any]:
    """Name, length and warm-up of the learning-rate schedule; `epochs` is its length where it has none of its own."""
    schedule = setup.model.schedule_config
    return {"name": schedule.name, "epochs": schedule.epochs or epochs, "warmup": schedule.warmup}


def describe_threshold(winner: Winner, setup: TextTrialSetup) -> dict[str, Any]:
    """The decision threshold and where it comes from; None where the task has none."""
    has_threshold = winner.schema.task in HAS_THRESHOLD
    source = "out-of-fold" if setup.datamodule.num_folds > 1 else "validation"
    return {
        "threshold": winner.schema.threshold if has_threshold else None,
        "threshold_source": f"{source} predictions of trial {winner.trial.number}" if has_threshold else None,
    }
