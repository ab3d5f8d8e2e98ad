"""Which options may be searched: what changes the meaning of the score is refused, what changes the model is not."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.space.comparable import TRAINING, check_searchable
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.tuning import tune
from tests.helpers.small_search import write_files

ROWS = r"changes which rows are validated on, their labels or their groups\. .* run a study for each"
TRAINER = r"changes what is validated and when, or nothing of the model\. .*max_epochs"
LOSS = r"monitor.metric is loss, so that it changes the metric .*\. Set monitor.metric to another"
WEIGHTS = r"balanced class weights in it follow from the training rows\. Set monitor.metric to another"
SEED = r"the best of them is the luckiest\. Remove it; hpo.seed_replicates"
VAL_FILE = {"data.val_file": "val.csv"}
BALANCED = {**VAL_FILE, "model.loss.class_weights": "balanced"}


def refused(name: str, metric: str = "f1", configured: dict[str, Any] | None = None) -> str | None:
    """The message, or None."""
    try:
        check_searchable(["model.optimizer.lr", name], (configured or {}).get, metric)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("name", "metric", "configured", "says"),
    [
        ("model.loss.focal_gamma", "loss", {}, LOSS),
        ("model.loss.name", "loss", {}, LOSS),
        ("model.loss.label_smoothing", "loss", {}, LOSS),
        *((f"data.split.{name}", "f1", VAL_FILE, ROWS) for name in ("folds", "val_fraction", "seed", "stratified")),
        *((f"data.table.{name}", "f1", {}, ROWS) for name in ("max_rows", "labels", "format", "label_separator")),
        *((f"data.{name}", "f1", {}, ROWS) for name in ("train_file", "val_file", "label_column", "group_column")),
        ("data.table.format", "f1", VAL_FILE, ROWS),
        ("model.task", "f1", {}, ROWS),
        ("data.train_file", "loss", BALANCED, WEIGHTS),
        ("data.table.max_rows", "loss", BALANCED, WEIGHTS),
        ("data.test_file", "f1", {}, r"no trial uses it\. Set it to one value"),
        *((f"trainer.{name}", "f1", {}, TRAINER) for name in ("limit_val_batches", "check_val_every_n_epoch")),
        *((f"trainer.{name}", "f1", {}, TRAINER) for name in ("val_check_interval", "fast_dev_run", "overfit_batches")),
        *((f"trainer.{name}", "f1", {}, TRAINER) for name in ("num_sanity_val_steps", "limit_test_batches")),
        *((name, "f1", {}, SEED) for name in ("seed_everything", "model.seed", "data.batching.seed")),
    ],
)
def test_what_changes_the_score_is_refused_with_the_reason_and_the_alternative(
    name: str, metric: str, configured: dict[str, Any], says: str
) -> None:
    found = refused(name, metric, configured)
    assert found is not None
    assert re.search(says, found)
    assert found.startswith(f"hpo.space: {name} can't be searched: ")


@pytest.mark.parametrize(
    ("name", "metric", "configured"),
    [
        *(
            (name, "loss", {})
            for name in ("model.optimizer.lr", "model.dropout", "model.lora.r", "model.schedule.warmup")
        ),
        *((name, "f1", {}) for name in ("model.name_or_path", "model.loss.name", "model.loss.focal_gamma")),
        *((f"data.{name}", "f1", {}) for name in ("max_length", "text_columns", "batch_size", "batching.balanced")),
        *((f"trainer.{name}", "f1", {}) for name in TRAINING),
        *((name, "f1", BALANCED) for name in ("data.train_file", "data.table.max_rows")),
        *((name, "loss", VAL_FILE) for name in ("data.train_file", "data.table.max_rows")),
    ],
)
def test_what_changes_the_model_alone_may_be_searched(name: str, metric: str, configured: dict[str, Any]) -> None:
    assert refused(name, metric, configured) is None


def test_every_option_that_trains_is_one_of_the_trainer() -> None:
    known = inspect.signature(pl.Trainer).parameters
    assert set(TRAINING) <= set(known)
    found = {name for name in known if refused(f"trainer.{name}") is None}
    assert found == set(TRAINING)  # an option that a later Lightning adds is refused until it is listed


class Relabelled(TextDataModule):
    """Has an option of its own, of which no rule knows that it decides what is validated on."""

    def __init__(self, *args: Any, easy: bool = False, noise: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.easy, self.noise = easy, noise
        self.save_hyperparameters({**self.hparams, "easy": easy, "noise": noise}, logger=False)

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if self.easy:
            self.folds = tuple(fold[:4] for fold in self.folds)


@pytest.mark.parametrize("enqueued", [False, True])
def test_an_unknown_option_that_changes_the_validation_rows_is_refused_before_a_study_exists(
    tmp_path: Path, enqueued: bool
) -> None:
    write_files(tmp_path)
    paths = {"train_file": str(tmp_path / "train.csv"), "cache_dir": str(tmp_path / "cache")}
    data = Relabelled(str(tmp_path / "model"), **paths, max_length=32, split={"folds": 2})
    model = BGEClassifier(str(tmp_path / "model"))
    says = (
        r"^space: data.easy can't be searched: with \{'data.easy': True\} other rows, labels or groups are validated on"
    )
    space: dict[str, Any] = {"data.easy": CategoricalDistribution([False, True])}
    enqueue = [{"data.easy": True}] if enqueued else []
    with pytest.raises(ConfigError, match=says):
        tune(model, data, space, run_dir=tmp_path / "run", n_trials=1, max_epochs=1, enqueue=enqueue)
    assert not (tmp_path / "run").exists()
    space = {"data.noise": FloatDistribution(0.0, 1.0)}  # one that does not may be searched
    trainer = {"precision": "32-true", "accelerator": "cpu"}
    done = tune(model, data, space, run_dir=tmp_path / "run", n_trials=1, max_epochs=1, trainer=trainer, refit=False)
    assert "data.noise" in done.best_params
