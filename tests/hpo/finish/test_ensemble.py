"""The fold models as one predictor: they are those of the search, their scores are averaged, and a stop keeps them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optuna.distributions import FloatDistribution
from safetensors.torch import load_file
from torch import Tensor

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.finish import ensemble
from lightning_bge.hpo.finish.results import describe_study
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.ensemble import Ensemble
from lightning_bge.models.metrics.threshold import best_threshold
from lightning_bge.tuning import TuneResult, tune
from tests.helpers.prediction_files import column, predict_training_rows
from tests.helpers.small_search import write_files

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("ensemble"))


def search(files: Path, run_dir: Path, task: Any = "binary", folds: int = 3, **options: Any) -> TuneResult:
    options = {"ensemble": True, "seed": 5, **options}
    model = BGEClassifier(str(files / "model"), task=task, **options.pop("model", {}))
    paths: dict[str, Any] = {name: str(files / "train.csv") for name in ("train_file", "test_file")}
    data = TextDataModule(
        str(files / "model"),
        **paths,
        cache_dir=str(files / "cache"),
        max_length=32,
        batch_size=8,
        split={"folds": folds},
    )
    return tune(
        *(model, data, {"model.optimizer.lr": FloatDistribution(1e-3, 1e-2, log=True)}),
        **{"run_dir": run_dir, "n_trials": 1, "max_epochs": 3, "pruner": {"name": "none"}},
        trainer={"precision": "32-true", "accelerator": "cpu"},
        **options,
    )


@pytest.fixture(scope="module")
def found(files: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    return search(files, tmp_path_factory.mktemp("study") / "study")


def texts_of(files: Path) -> list[tuple[str, str]]:
    return list(zip(*(column(files / "train.csv", f"text_{side}") for side in "ab"), strict=True))


def member_scores(found: TuneResult, files: Path, task: Any = "binary") -> list[Tensor]:
    folders = sorted(Path(str(found.model_dir)).glob("fold-*"))
    assert len(folders) == 3
    return [BGEClassifier(str(folder), task).predict(texts_of(files)).scores for folder in folders]


def test_each_model_is_that_of_its_fold(found: TuneResult, files: Path) -> None:
    assert found.summary is not None
    saved = load_file(found.run_dir / "oof" / f"{found.summary['best_trial']}.safetensors")
    for fold, scores in enumerate(member_scores(found, files)):
        rows = saved["rows"][saved["fold"] == fold]
        expected = saved["logits"][saved["fold"] == fold].flatten().sigmoid()
        torch.testing.assert_close(scores[rows], expected, rtol=1e-5, atol=1e-6)
    assert len(set(found.summary["fold_epochs"])) > 1, "the test needs folds that end at different epochs"


def test_every_reader_averages_the_scores(run: Run, found: TuneResult, files: Path, tmp_path: Path) -> None:
    assert found.summary is not None
    mean = torch.stack(member_scores(found, files)).mean(dim=0)
    ours = Ensemble(str(found.model_dir)).predict(texts_of(files))
    torch.testing.assert_close(ours.scores, mean)
    threshold = found.summary["threshold"]
    assert ours.labels == [str(int(score >= threshold)) for score in mean.tolist()]
    saved = load_file(found.run_dir / "oof" / f"{found.summary['best_trial']}.safetensors")
    assert threshold == best_threshold(saved["logits"].flatten().sigmoid().numpy(), saved["labels"].numpy())
    test = found.run_dir / "test.csv"
    predict_training_rows(run, str(found.model_dir), files, tmp_path / "p.csv")
    for path in (test, tmp_path / "p.csv"):
        assert [float(score) for score in column(path, "score")] == pytest.approx(mean.tolist(), abs=2e-6)
        assert column(path, "label") == ours.labels
    truth = np.array(column(test, "truth")) == "1"
    assert found.summary["test"]["accuracy"] == pytest.approx(np.mean((mean.numpy() >= threshold) == truth))
    expected = -np.mean(np.log(np.where(truth, mean.numpy(), 1 - mean.numpy())))
    assert found.summary["test"]["loss"] == pytest.approx(expected, rel=1e-4)


def test_what_was_exported_is_said(found: TuneResult) -> None:
    assert found.summary is not None
    assert found.summary["refit"] is None
    members = found.summary["ensemble"]["members"]
    assert [one["folder"] for one in members] == ["fold-0", "fold-1", "fold-2"]
    assert [one["epochs"] for one in members] == found.summary["fold_epochs"]
    assert sum(one["rows"] for one in members) == 2 * 40
    lines = describe_study(found.run_dir, found.summary)
    assert "exported: the models of the 3 folds, whose scores are averaged" in lines
    assert "each of which one model has made, and not their mean" in lines
    assert "lightning_bge.models.Ensemble" in lines
    assert "refitted" not in lines
    assert not (found.run_dir / "members").exists()


def test_a_stop_keeps_the_models_that_are_trained(
    found: TuneResult, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, trained = ensemble.Winner.fit, []

    def stopped(self: ensemble.Winner, setup: Any, epochs: int) -> Any:
        trained.append(epochs)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return fit(self, setup, epochs)

    monkeypatch.setattr(ensemble.Winner, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        search(files, tmp_path / "study")
    assert not (tmp_path / "study" / "model").exists()
    again = search(files, tmp_path / "study")
    assert found.summary is not None
    assert trained == [found.summary["fold_epochs"][k] for k in (0, 1, 1, 2)]
    for name in ("fold-0", "fold-1", "fold-2"):
        first, second = (load_file(Path(str(one.model_dir)) / name / "model.safetensors") for one in (found, again))
        assert all(weight.equal(second[key]) for key, weight in first.items())
    # a kill after the export: the models are there, and only the test file is scored
    (tmp_path / "study" / "summary.json").unlink()
    trained.clear()
    assert search(files, tmp_path / "study").summary is not None
    assert trained == []


def test_models_of_another_winner_are_not_kept(files: Path, found: TuneResult, tmp_path: Path) -> None:
    shutil.copytree(found.run_dir, tmp_path / "study")
    plain = search(files, tmp_path / "study")
    assert plain.summary is not None
    scaled = search(files, tmp_path / "study", calibration="temperature")
    assert scaled.summary is not None
    temperature = scaled.summary["calibration"]["temperature"]
    old, new = found.run_dir / "model", tmp_path / "study" / "model"
    after = load_file(new / "fold-1" / "model.safetensors")
    for name, weight in load_file(old / "fold-1" / "model.safetensors").items():
        torch.testing.assert_close(after[name], weight / temperature if name.startswith("classifier.") else weight)
    for folder in (new, new / "fold-0"):
        schema = json.loads((folder / "lightning_bge.json").read_text())
        assert schema["threshold"] == scaled.summary["threshold"]
    assert scaled.summary["threshold"] != plain.summary["threshold"]
    # and a refit takes the place of the folder
    refitted = search(files, tmp_path / "study", ensemble=False)
    assert not list(Path(str(refitted.model_dir)).glob("fold-*"))


@pytest.mark.parametrize("task", ["multiclass", "regression"])
def test_other_tasks_and_lora(files: Path, tmp_path: Path, task: Any) -> None:
    found = search(files, tmp_path / "study", task, model={"lora": {"r": 2}})
    mean = torch.stack(member_scores(found, files, task)).mean(dim=0)
    ours = Ensemble(str(found.model_dir)).predict(texts_of(files))
    torch.testing.assert_close(ours.scores, mean)
    name = "score" if task == "regression" else "score:1"
    scores = mean if task == "regression" else mean[:, 1]
    test = found.run_dir / "test.csv"
    assert [float(score) for score in column(test, name)] == pytest.approx(scores.tolist(), abs=2e-6)
    if task == "multiclass":
        assert ours.labels == column(test, "label")


def test_wrong_use_is_an_error(found: TuneResult, files: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ensemble: expected false without folds, got true"):
        search(files, tmp_path / "study", folds=1)
    assert not (tmp_path / "study").exists()
    for options in ({"refit": False}, {"refit_val_file": True}):
        with pytest.raises(ConfigError, match=r"hpo\.ensemble: expected false with hpo\.refit"):
            StudyConfig(ensemble=True, **options)
    with pytest.raises(ConfigError, match="holds several models, whose scores are averaged by"):
        BGEClassifier(str(found.model_dir)).predict(texts_of(files))
    with pytest.raises(ConfigError, match="expected a folder that a study with"):
        Ensemble(files / "model")
