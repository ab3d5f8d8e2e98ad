"""Metrics on resamples equal torchmetrics on the repeated rows."""

import numpy as np
import pytest
import torch

from lightning_bge.hpo.evaluation.resampled_metrics import resampled_metric
from lightning_bge.models.metrics.compute import compute_metrics
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.types import Schema, Task

N, B = 60, 7
NAMES = {"binary": ("no", "yes"), "multiclass": ("a", "b", "c"), "multilabel": ("a", "b", "c"), "regression": ()}
METRICS: dict[Task, tuple[str, ...]] = {
    "binary": ("auroc", "average_precision", "recall_at_precision_60", "recall_at_precision_99"),
    "multiclass": ("auroc", "average_precision"),
    "multilabel": ("auroc", "average_precision"),
    "regression": ("spearman", "pearson", "mse", "mae", "r2"),
}


def rows_of(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Logits with ties, and labels."""
    random = np.random.default_rng(0)
    outputs = 1 if task in ("binary", "regression") else 3
    logits = random.normal(size=(N, outputs)).round(1).astype(np.float32)
    labels = {
        "binary": random.random(N) < 0.4,
        "multiclass": random.integers(3, size=N),
        "multilabel": random.random((N, 3)) < 0.4,
        "regression": random.normal(size=N).round(1),
    }[task]
    return logits, labels if task == "multiclass" else labels.astype(np.float32)


def repeated(task: Task, metric: str, logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    rows = np.repeat(np.arange(len(logits)), weights.astype(int))
    found = Predictions(torch.arange(len(rows)), torch.from_numpy(logits[rows]), torch.from_numpy(labels[rows]))
    return compute_metrics(Schema(task, NAMES[task], ("text",), 8), found, monitored=metric)[metric]


@pytest.mark.parametrize(("task", "metric"), [(task, metric) for task, each in METRICS.items() for metric in each])
def test_a_resample_is_the_rows_repeated_as_often_as_they_were_drawn(task: Task, metric: str) -> None:
    logits, labels = rows_of(task)
    weights = np.random.default_rng(1).multinomial(N, np.full(N, 1 / N), size=B).T.astype(np.float32)
    found = resampled_metric(task, metric, logits, labels, weights)
    expected = [repeated(task, metric, logits, labels, weights[:, one]) for one in range(B)]
    assert found == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("metric", ["map", "mrr"])
def test_groups_are_drawn_as_a_whole(metric: str) -> None:
    random = np.random.default_rng(2)
    groups = np.arange(N) // 5
    logits, labels = (
        (random.permutation(N)[:, None] / 30).astype(np.float32),
        (random.random(N) < 0.3).astype(np.float32),
    )
    times = random.integers(0, 3, size=(12, B))
    found = resampled_metric("binary", metric, logits, labels, times[groups].astype(np.float32), groups)
    for one in range(B):
        drawn = np.repeat(np.arange(12), times[:, one])
        rows = np.concatenate([np.flatnonzero(groups == group) for group in drawn])
        numbers = np.repeat(np.arange(len(drawn)), 5)
        parts = [torch.from_numpy(each[rows]) for each in (logits, labels)]
        predictions = Predictions(torch.arange(len(rows)), *parts, torch.from_numpy(numbers))
        expected = compute_metrics(Schema("binary", NAMES["binary"], ("text",), 8), predictions)[metric]
        assert found[one] == pytest.approx(expected, abs=1e-6)


def test_a_resample_of_one_class_has_no_ranking() -> None:
    logits, labels = rows_of("binary")
    weights = np.stack([labels, 1 - labels, np.ones(N)], axis=1).astype(np.float32)
    found = resampled_metric("binary", "auroc", logits, labels, weights)
    assert np.isnan(found).tolist() == [True, True, False]
    assert np.isnan(resampled_metric("binary", "average_precision", logits, labels, weights)).tolist() == [
        True,
        True,
        False,
    ]


def test_a_class_that_a_resample_lacks_does_not_count() -> None:
    logits, labels = rows_of("multiclass")
    weights = (labels != 2).astype(np.float32)[:, None]
    both = labels != 2
    from scipy.special import softmax

    score = softmax(logits, axis=1)
    each = [
        resampled_metric(
            "binary", "auroc", score[both, one : one + 1], (labels[both] == one).astype(np.float32), weights[both]
        )
        for one in (0, 1)
    ]
    assert resampled_metric("multiclass", "auroc", logits, labels, weights) == pytest.approx(np.mean(each))


def test_a_correlation_with_a_constant_is_zero() -> None:
    labels = np.arange(5.0)
    for metric in ("pearson", "spearman"):
        assert resampled_metric("regression", metric, np.ones((5, 1)), labels, np.ones((5, 1))) == 0
