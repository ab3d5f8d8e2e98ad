"""Metrics of torchmetrics by the path of their class."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor
from torchmetrics import Metric as TorchMetric

from lightning_bge.errors import ConfigError
from lightning_bge.models.metrics.class_path import try_class
from lightning_bge.models.metrics.compute import compute_metrics
from lightning_bge.models.metrics.config import MonitorConfig, check_monitor
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.types import Schema

N = 40
SCHEMAS = {
    "binary": Schema("binary", ("no", "yes"), ("text",), 8),
    "multiclass": Schema("multiclass", ("a", "b", "c"), ("text",), 8),
    "multilabel": Schema("multilabel", ("a", "b", "c", "d"), ("text",), 8),
    "regression": Schema("regression", (), ("text",), 8),
}


class Undecided(TorchMetric):
    """One that does not say what is better."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.value = (preds - target).abs().mean()

    def compute(self) -> Tensor:
        return self.value


class Needs(Undecided):
    higher_is_better = False

    def __init__(self, weight: float) -> None:
        super().__init__()


HERE = Undecided.__module__


def predictions(task: str) -> Predictions:
    generator = torch.Generator().manual_seed(0)
    outputs = SCHEMAS[task].num_outputs
    logits = torch.randn(N, outputs, generator=generator)
    labels = {
        "binary": (torch.arange(N) % 2).float(),
        "multiclass": torch.arange(N) % 3,
        "multilabel": (torch.arange(N * 4).reshape(N, 4) % 3 == 0).float(),
        "regression": torch.randn(N, generator=generator),
    }[task]
    return Predictions(torch.arange(N), logits, labels, torch.arange(N) // 8)


def value(task: str, path: str, **init_args: Any) -> float:
    metric = check_monitor(MonitorConfig({"class_path": path, "init_args": init_args}), task)  # type: ignore[arg-type]
    assert isinstance(metric.metric, dict)
    try_class(metric.metric, SCHEMAS[task])
    return compute_metrics(SCHEMAS[task], predictions(task), monitored=metric.metric)[metric.name]


def test_binary() -> None:
    found = predictions("binary")
    assert found.labels is not None
    y, p = found.labels.numpy(), found.logits.squeeze(-1).sigmoid().numpy()
    fbeta = value("binary", "torchmetrics.classification.BinaryFBetaScore", beta=2.0, threshold=0.3)
    assert fbeta == pytest.approx(sk.fbeta_score(y, p > 0.3, beta=2))
    assert value("binary", "torchmetrics.MatthewsCorrCoef") == pytest.approx(sk.matthews_corrcoef(y, p > 0.5), abs=1e-6)
    assert value("binary", "torchmetrics.MeanSquaredError") == pytest.approx(sk.brier_score_loss(y, p), abs=1e-6)


def test_several_classes_get_their_number() -> None:
    found = predictions("multiclass")
    assert found.labels is not None
    y, p = found.labels.numpy(), found.logits.softmax(-1).numpy()
    kappa = sk.cohen_kappa_score(y, p.argmax(1))
    assert value("multiclass", "torchmetrics.CohenKappa") == pytest.approx(kappa, abs=1e-6)
    assert value("multiclass", "torchmetrics.classification.MulticlassCohenKappa") == pytest.approx(kappa, abs=1e-6)
    top = value("multiclass", "torchmetrics.Accuracy", top_k=2, average="micro")
    assert top == pytest.approx(sk.top_k_accuracy_score(y, p, k=2))


def test_several_labels_and_numbers() -> None:
    found = predictions("multilabel")
    assert found.labels is not None
    y, p = found.labels.numpy(), found.logits.sigmoid().numpy()
    assert value("multilabel", "torchmetrics.HammingDistance") == pytest.approx(sk.hamming_loss(y, p > 0.5), abs=1e-6)
    found = predictions("regression")
    assert found.labels is not None
    expected = sk.max_error(found.labels.numpy(), found.logits.squeeze(-1).numpy())
    assert value("regression", "torchmetrics.MinkowskiDistance", p=50) == pytest.approx(expected, rel=0.05)


def test_rows_of_groups_are_ranked() -> None:
    assert 0 < value("binary", "torchmetrics.retrieval.RetrievalNormalizedDCG") < 1
    with pytest.raises(ConfigError, match=r"RetrievalMRR ranks the rows of each group; name data\.group_column"):
        check_monitor(MonitorConfig("torchmetrics.retrieval.RetrievalMRR"), "binary", grouped=False)


def test_what_follows_from_the_class() -> None:
    found = check_monitor(MonitorConfig("torchmetrics.HammingDistance"), "multilabel")
    assert (found.mode, found.direction, found.logged) == ("min", "minimize", "val_hamming_distance")
    assert check_monitor(found, "multilabel") == found  # as a run's configuration holds it
    found = check_monitor(MonitorConfig("torchmetrics.AUROC"), "binary")
    assert (found.mode, found.direction, found.logged) == ("max", "maximize", "val_torchmetrics_auroc")
    assert (found.metric, found.threshold, found.tuned) == ({"class_path": "torchmetrics.AUROC"}, "fixed", False)


def test_the_user_says_what_is_better_where_the_class_does_not() -> None:
    metric = f"{HERE}.Undecided"
    assert check_monitor(MonitorConfig(metric, mode="min"), "binary").direction == "minimize"
    with pytest.raises(ConfigError, match=r"Undecided does not say .* set monitor\.mode to max or min"):
        check_monitor(MonitorConfig(metric), "binary")
    with pytest.raises(ConfigError, match=r"monitor\.mode: expected null or max with .*AUROC, got min"):
        check_monitor(MonitorConfig("torchmetrics.AUROC", mode="min"), "binary")
    with pytest.raises(ConfigError, match=r"monitor\.mode: expected null or max with monitor\.metric=f1, got min"):
        check_monitor(MonitorConfig("f1", mode="min"), "binary")
    with pytest.raises(ConfigError, match=r"monitor\.mode: expected max, min or null, got 'up'"):
        MonitorConfig(mode="up")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("torchmetrics.NoSuch", r"monitor\.metric: expected the path of a class .*got torchmetrics\.NoSuch"),
        ("no_such_package.Metric", "No module named 'no_such_package'"),
        ("torch.nn.Linear", r"inherits from torchmetrics\.Metric, got torch\.nn\.Linear"),
        ({"class_path": "torchmetrics.classification.BinaryFBetaScore"}, "does not accept init_args {}: .*beta"),
        ({"class_path": "torchmetrics.AUROC", "init_args": {"colour": 1}}, "does not accept init_args .*colour"),
        ({"class_path": "torchmetrics.AUROC", "init_args": [1]}, "expected init_args as names and values"),
        ({"class_path": "torchmetrics.AUROC", "beta": 2}, "expected the keys class_path and init_args"),
        ({"init_args": {}}, "expected the keys class_path and init_args"),
        (f"{HERE}.Needs", "does not accept init_args {}: .*weight"),
        ("fscore", "a binary task has f1, .* or a class such as torchmetrics.AUROC; got fscore"),
    ],
)
def test_wrong_classes_and_arguments(metric: str | dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        check_monitor(MonitorConfig(metric), "binary")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "path", "expected"),
    [
        ("multiclass", "torchmetrics.classification.BinaryAccuracy", r"can't be computed of the scores \[24, 3\]"),
        ("binary", "torchmetrics.classification.MultilabelAccuracy", "does not accept|can't be computed"),
        ("regression", "torchmetrics.classification.BinaryAUROC", "of a regression task"),
        ("binary", "torchmetrics.text.BLEUScore", "can't be computed of the scores"),
        ("binary", "torchmetrics.classification.BinaryConfusionMatrix", "one number|does not say"),
        ("binary", "torchmetrics.ROC", "one number|does not say"),
    ],
)
def test_metrics_of_something_else(task: str, path: str, expected: str) -> None:
    def check() -> None:
        check_monitor(MonitorConfig(path), task)  # type: ignore[arg-type]
        try_class({"class_path": path}, SCHEMAS[task])

    with pytest.raises(ConfigError, match=expected):
        check()


def test_a_metric_of_each_class_needs_an_average() -> None:
    metric = {"class_path": "torchmetrics.F1Score", "init_args": {"average": "none"}}
    with pytest.raises(ConfigError, match=re.escape("torchmetrics.F1Score gives 3 numbers: set average")):
        try_class(metric, SCHEMAS["multiclass"])
