"""The refit: the rows, epochs and schedule that it trains with, and what it says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import FloatDistribution
from transformers import AutoModelForSequenceClassification

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.finish.results import describe_study
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.trainer import quiet_trainer
from lightning_bge.tuning import TuneResult, tune
from tests.helpers.small_search import write_files

FAST: dict[str, Any] = {"precision": "32-true", "accelerator": "cpu"}
LOSS: dict[str, Any] = {"class_weights": "balanced"}
SCHEDULE: dict[str, Any] = {"name": "cosine", "warmup": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training file, a validation file with other shares of the labels, and both in one file."""
    folder = write_files(tmp_path_factory.mktemp("refit"))
    head, *rows = (folder / "train.csv").read_text().splitlines()
    more = [f"w{i} w{i + 1},w{i},{int(i % 4 == 0)}" for i in range(12)]
    (folder / "val.csv").write_text("\n".join([head, *more]) + "\n")
    (folder / "both.csv").write_text("\n".join([head, *rows, *more]) + "\n")
    return folder


def data_of(files: Path, **changes: Any) -> TextDataModule:
    options: dict[str, Any] = {
        "train_file": str(files / "train.csv"),
        "cache_dir": str(files / "cache"),
        "max_length": 32,
        "batch_size": 8,
        **changes,
    }
    return TextDataModule(str(files / "model"), **options)


def search(files: Path, run_dir: Path, data: TextDataModule, **options: Any) -> TuneResult:
    model = BGEClassifier(str(files / "model"), loss=LOSS, schedule=SCHEDULE, dropout=0.1)
    space = {"model.optimizer.lr": FloatDistribution(1e-4, 1e-2, log=True)}
    given: dict[str, Any] = {"n_trials": 1, "max_epochs": 3, "trainer": FAST, "pruner": {"name": "none"}, **options}
    return tune(model, data, space, run_dir=run_dir, **given)


def trained_alone(files: Path, found: TuneResult, file: str) -> dict[str, Any]:
    """The weights after a training on all rows of one file, by Lightning and without a study."""
    assert found.summary is not None
    schedule = {**SCHEDULE, "epochs": 3}
    optimizer = {"lr": found.best_params["model.optimizer.lr"]}
    model = BGEClassifier(str(files / "model"), loss=LOSS, schedule=schedule, optimizer=optimizer, dropout=0.1)
    data = data_of(files, train_file=str(files / file), batching={"seed": 42})
    data.select_fold(None)
    settings = {**FAST, "max_epochs": found.summary["refit"]["epochs"], "limit_val_batches": 0}
    quiet_trainer(settings).fit(model, datamodule=data)
    assert model.net is not None
    return dict(model.net.model.state_dict())


@pytest.mark.parametrize("included", [False, True])
def test_the_refit_trains_on_the_rows_that_it_names(files: Path, tmp_path: Path, included: bool) -> None:
    data = data_of(files, val_file=str(files / "val.csv"))
    found = search(files, tmp_path / "study", data, refit_val_file=included)
    assert found.summary is not None
    assert found.model_dir is not None
    refit = found.summary["refit"]
    assert refit["train_file_rows"] == 40
    assert (refit["val_file_rows"], refit["val_file_rows_left_out"]) == ((12, 0) if included else (0, 12))
    assert refit["schedule"] == {"name": "cosine", "epochs": 3, "warmup": 2}
    assert [refit["epochs"]] == found.summary["fold_epochs"]
    assert refit["threshold"] == found.summary["threshold"]
    assert refit["threshold_source"] == "validation predictions of trial 0"
    exported = AutoModelForSequenceClassification.from_pretrained(found.model_dir).state_dict()
    for name, weight in trained_alone(files, found, "both.csv" if included else "train.csv").items():
        assert exported[name].equal(weight), name
    # the closing lines and the report
    lines = describe_study(tmp_path / "study", found.summary)
    rows = "all 40 rows of the training file" + (" and all 12 rows of the validation file" if included else "")
    assert f"refitted on {rows} for {refit['epochs']} epoch" in lines
    assert ("the 12 rows of the validation file (hpo.refit_val_file includes them)" in lines) == (not included)
    assert "as in the trial: cosine over 3 epochs, warm-up 2 steps" in lines
    assert f"efitted on {rows} for" in (tmp_path / "study" / "report.html").read_text()


def test_another_choice_of_rows_refits_once_more(files: Path, tmp_path: Path) -> None:
    for included in (False, True, True):
        data = data_of(files, val_file=str(files / "val.csv"))
        written = (tmp_path / "study" / "summary.json").stat().st_mtime_ns if included else 0
        found = search(files, tmp_path / "study", data, refit_val_file=included)
        assert found.summary is not None
        assert found.summary["refit"]["val_file_rows"] == 12 * included
    assert (tmp_path / "study" / "summary.json").stat().st_mtime_ns == written


def test_without_a_validation_file_there_is_nothing_to_include(files: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^refit_val_file: expected false without data\.val_file, got true"):
        search(files, tmp_path / "study", data_of(files, split={"folds": 2}), refit_val_file=True)
    assert not (tmp_path / "study").exists()
    with pytest.raises(ConfigError, match=r"hpo\.refit_val_file: expected false without a refit"):
        StudyConfig(refit=False, refit_val_file=True)


def test_folds_are_named_as_the_source_of_epochs_and_threshold(files: Path, tmp_path: Path) -> None:
    found = search(files, tmp_path / "study", data_of(files, split={"folds": 2}))
    assert found.summary is not None
    lines = describe_study(tmp_path / "study", found.summary)
    assert "refitted on all 40 rows of the training file for" in lines
    assert "the mean of the folds' scored epochs" in lines
    assert f"threshold {found.summary['threshold']:.3f} comes from the out-of-fold predictions of trial 0" in lines
    assert "validation file" not in lines
