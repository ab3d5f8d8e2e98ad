"""The temperature of a study: cross-fitted figures, exported weights, and the scores of all readers of the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optuna.distributions import FloatDistribution
from safetensors.torch import load_file
from scipy.optimize import minimize_scalar
from sentence_transformers import CrossEncoder
from sklearn.metrics import log_loss
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.finish import calibration
from lightning_bge.hpo.finish.calibration import calibrate_out_of_fold
from lightning_bge.hpo.finish.results import describe_study
from lightning_bge.hpo.trial.out_of_fold import predictions_file, save_predictions
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder import TextClassifier, load_classifier
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.tuning import TuneResult, tune
from tests.helpers.prediction_files import column, predict_training_rows
from tests.helpers.small_search import write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("calibration"))


def search(files: Path, run_dir: Path, task: Any = "binary", **options: Any) -> TuneResult:
    options = {"calibration": "temperature", "model": {}, **options}
    model = BGEClassifier(str(files / "model"), task=task, **options.pop("model"))
    paths: dict[str, Any] = {name: str(files / "train.csv") for name in ("train_file", "test_file")}
    data = TextDataModule(
        str(files / "model"), **paths, cache_dir=str(files / "cache"), max_length=32, split={"folds": 2}
    )
    return tune(
        *(model, data, {"model.optimizer.lr": FloatDistribution(1e-4, 1e-2, log=True)}),
        **{"run_dir": run_dir, "n_trials": 1, "max_epochs": 2, "pruner": {"name": "none"}},
        trainer={"precision": "32-true", "accelerator": "cpu"},
        **options,
    )


def saved(tmp_path: Path, folds: int) -> tuple[Path, Tensor, Tensor]:
    random = np.random.default_rng(3)
    true = random.normal(size=(90, 1))
    labels = torch.tensor((random.random(90) < 1 / (1 + np.exp(-true[:, 0]))).astype(np.float32))
    logits = torch.tensor(true * np.where(np.arange(90) % 3 == 0, 6.0, 2.0)[:, None]).float()  # folds differ
    parts = [Predictions(rows := torch.arange(k, 90, folds), logits[rows], labels[rows]) for k in range(folds)]
    save_predictions(parts, tmp_path, 0)
    return predictions_file(tmp_path, 0), logits[:, 0], labels


def reference(logits: Tensor, labels: Tensor) -> float:
    """By scipy on scikit-learn's loss."""
    found = minimize_scalar(
        lambda temperature: log_loss(labels, 1 / (1 + np.exp(-logits.double().numpy() / temperature))),
        bounds=(0.05, 20),
        method="bounded",
    )
    return float(found.x)


def test_each_fold_is_measured_with_a_temperature_of_the_others(tmp_path: Path) -> None:
    path, logits, labels = saved(tmp_path, 3)
    found = calibrate_out_of_fold(path, "binary")
    assert found.temperature == pytest.approx(reference(logits, labels), rel=1e-3)
    scaled, fold = logits.clone(), torch.arange(90) % 3
    for k in range(3):
        scaled[fold == k] /= reference(logits[fold != k], labels[fold != k])
    loss = "negative_log_likelihood"
    assert found.before[loss] == pytest.approx(log_loss(labels, logits.double().sigmoid()), rel=1e-5)
    assert found.after[loss] == pytest.approx(log_loss(labels, scaled.double().sigmoid()), rel=1e-3)
    assert found.after[loss] > log_loss(labels, (logits.double() / found.temperature).sigmoid()) + 1e-3
    assert "one of the other folds" in found.note


def test_a_single_split_says_that_it_is_optimistic(tmp_path: Path) -> None:
    path, logits, labels = saved(tmp_path, 1)
    found = calibrate_out_of_fold(path, "binary")
    assert "optimistic" in found.note
    expected = log_loss(labels, (logits.double() / found.temperature).sigmoid())
    assert found.after["negative_log_likelihood"] == pytest.approx(expected, rel=1e-5)
    separable = save_predictions([Predictions(torch.arange(90), labels[:, None] * 2 - 1, labels)], tmp_path, 1)
    assert separable is None
    assert "at its limit, 0.05" in calibrate_out_of_fold(predictions_file(tmp_path, 1), "binary").note


def test_every_reader_of_the_exported_folder_gives_calibrated_scores(
    run: Callable[..., tuple[int, str, str]], files: Path, tmp_path: Path
) -> None:
    plain = search(files, tmp_path / "plain", calibration=None)
    found = search(files, tmp_path / "scaled")
    assert plain.summary is not None
    assert found.summary is not None
    assert found.model_dir is not None
    temperature = found.summary["calibration"]["temperature"]
    assert temperature != 1
    assert plain.summary["calibration"] is None
    # the out-of-fold scores, and the decisions on them
    saved = load_file(tmp_path / "scaled" / "oof" / f"{found.summary['best_trial']}.safetensors")
    expected = (saved["logits"][saved["rows"].argsort()].flatten() / temperature).sigmoid()
    oof = [tmp_path / name / "oof.csv" for name in ("plain", "scaled")]
    assert [float(score) for score in column(oof[1], "score")] == pytest.approx(expected.tolist(), abs=1e-5)
    assert column(oof[0], "label") == column(oof[1], "label")
    before, after = plain.summary["threshold"], found.summary["threshold"]
    assert before != after
    assert found.summary["out_of_fold"]["f1"] == plain.summary["out_of_fold"]["f1"]
    # transformers
    models = [AutoModelForSequenceClassification.from_pretrained(one.model_dir).eval() for one in (plain, found)]
    texts = list(zip(column(files / "train.csv", "text_a"), column(files / "train.csv", "text_b"), strict=True))
    ids = torch.randint(5, 45, (7, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, scaled = (model(ids).logits for model in models)
    torch.testing.assert_close(scaled, logits / temperature)
    # sentence-transformers, the test file, and `predict`
    peer = CrossEncoder(str(found.model_dir), device="cpu").predict(texts)
    test = [tmp_path / name / "test.csv" for name in ("plain", "scaled")]
    assert [float(score) for score in column(test[1], "score")] == pytest.approx(peer.tolist(), abs=1e-5)
    assert column(test[0], "label") == column(test[1], "label")
    score = np.array(column(test[0], "score"), dtype=float)
    assert peer == pytest.approx(1 / (1 + ((1 - score) / score) ** (1 / temperature)), abs=1e-4)
    predict_training_rows(run, str(found.model_dir), files, tmp_path / "p.csv")
    assert column(tmp_path / "p.csv", "label") == column(test[1], "label")
    read = [[float(score) for score in column(path, "score")] for path in (tmp_path / "p.csv", test[1])]
    assert read[0] == pytest.approx(read[1], abs=1e-6)  # the file of a run has six digits
    # what a user reads
    lines = describe_study(tmp_path / "scaled", found.summary)
    assert f"calibrated by the temperature {temperature:.3f}: negative log-likelihood" in lines
    assert "Calibrated by the temperature" in (tmp_path / "scaled" / "report.html").read_text()


@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_lora_and_several_classes_export_a_scaled_layer(files: Path, tmp_path: Path, task: Any) -> None:
    options: dict[str, Any] = {"task": task, "model": {"lora": {"r": 2}}}
    plain = search(files, tmp_path / "plain", calibration=None, **options)
    found = search(files, tmp_path / "scaled", **options)
    assert found.summary is not None
    temperature = found.summary["calibration"]["temperature"]
    before, after = (load_file(Path(str(one.model_dir)) / "model.safetensors") for one in (plain, found))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight / temperature if name.startswith("classifier.") else weight)


def test_what_can_not_be_calibrated_is_refused_before_the_first_trial(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="calibration: expected null, as a regression has no probabilities"):
        search(files, tmp_path / "study", "regression")

    def load(*args: Any, **options: Any) -> TextClassifier:
        net = load_classifier(*args, **options)
        net.model.classifier = nn.Sequential(net.model.classifier, nn.Tanh())  # type: ignore[assignment]
        return net

    monkeypatch.setattr(calibration, "load_classifier", load)
    with pytest.raises(ConfigError, match="calibration: a temperature can't be built into a bert"):
        search(files, tmp_path / "study")
    assert not (tmp_path / "study").exists()
    with pytest.raises(ConfigError, match=r"hpo\.calibration: expected temperature or null, got isotonic"):
        StudyConfig(calibration="isotonic")  # type: ignore[arg-type]
