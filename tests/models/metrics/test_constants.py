from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_bge.models.metrics.config import MonitorConfig
from lightning_bge.models.metrics.constants import majority_baseline, warn_of_constants
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.types import Schema

BINARY = Schema("binary", ("no", "yes"), ("text",), 16)


@pytest.mark.parametrize(
    ("task", "labels", "metric", "expected"),
    [
        ("binary", [1.0, 0.0, 0.0, 0.0], "accuracy", 0.75),
        ("binary", [1.0, 0.0, 0.0, 0.0], "f1", 0.4),
        ("binary", [1.0, 0.0, 0.0, 0.0], "average_precision", 0.25),
        ("multiclass", [0, 1, 1, 2], "accuracy", 0.5),
        ("regression", [1.0, 3.0], "mse", 1.0),
        ("regression", [1.0, 3.0], "spearman", 0.0),
    ],
)
def test_the_baseline_is_the_best_of_the_constant_answers(
    task: Any, labels: list[float], metric: str, expected: float
) -> None:
    names = ("a", "b", "c") if task == "multiclass" else BINARY.labels
    schema = Schema(task, names if task != "regression" else (), ("text",), 16)
    rows = torch.arange(len(labels))
    predictions = Predictions(rows, torch.randn(len(labels), schema.num_outputs), torch.tensor(labels))
    assert majority_baseline(schema, predictions, MonitorConfig(metric)) == pytest.approx(expected)


def test_a_model_that_is_no_better_than_a_constant_is_named() -> None:
    labels = torch.tensor([1.0, 0.0, 0.0, 0.0])
    predictions = Predictions(torch.arange(4), torch.randn(4, 1), labels)
    monitor = MonitorConfig("accuracy")
    assert warn_of_constants(BINARY, predictions, monitor, 0.8, 0.75) == []
    [warning] = warn_of_constants(BINARY, predictions, monitor, 0.75, 0.75)
    assert warning.startswith("no better than the same answer for every row: accuracy 0.7500, and 0.7500 for that")
    lower = MonitorConfig("loss")
    assert warn_of_constants(BINARY, predictions, lower, 0.5, 0.6) == []
    assert len(warn_of_constants(BINARY, predictions, lower, 0.6, 0.6)) == 1
    same = Predictions(torch.arange(4), torch.zeros(4, 1), labels)
    [warning] = warn_of_constants(BINARY, same, monitor, 0.8, 0.75)
    assert warning.startswith("every row has the same score")
