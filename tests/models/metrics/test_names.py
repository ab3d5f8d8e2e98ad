"""Names of metrics that are given by their class."""

from __future__ import annotations

import pytest

from lightning_bge.models.metrics.names import METRICS, metric_name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("torchmetrics.classification.BinaryFBetaScore", "binary_fbeta_score"),
        ("torchmetrics.MatthewsCorrCoef", "matthews_corr_coef"),
        ("torchmetrics.classification.BinaryAUROC", "binary_auroc"),
        ("torchmetrics.F1Score", "f1_score"),
        ("torchmetrics.Accuracy", "torchmetrics_accuracy"),
        ("torchmetrics.classification.AveragePrecision", "torchmetrics_average_precision"),
        ("my.package.Cost", "cost"),
    ],
)
def test_name_of_a_class(path: str, name: str) -> None:
    assert metric_name({"class_path": path}) == name
    assert not any(name in each for each in METRICS.values())


def test_a_name_is_itself() -> None:
    assert metric_name("f0.5") == "f0.5"
