"""Temperatures and calibration errors, against scikit-learn, a grid, and plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torch import Tensor

from lightning_bge.errors import ConfigError
from lightning_bge.models.output.calibration import (
    HIGHEST,
    LOWEST,
    check_has_probabilities,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
)

TASKS = ("binary", "multiclass", "multilabel")
Pair = tuple[Tensor, Tensor]


def made(task: str, sureness: float, rows: int = 400) -> Pair:
    """Logits that are `sureness` times as large as those from which the labels are drawn."""
    random = np.random.default_rng(0)
    true = random.normal(scale=1.5, size=(rows, 1 if task == "binary" else 3))
    if task == "multiclass":
        labels = np.argmax(true + random.gumbel(size=true.shape), axis=1)
        return torch.tensor(sureness * true).float(), torch.tensor(labels)
    labels = (random.random(true.shape) < 1 / (1 + np.exp(-true))).astype(np.float32)
    return torch.tensor(sureness * true).float(), torch.tensor(labels[:, 0] if task == "binary" else labels)


def sklearn_loss(task: str, logits: Tensor, labels: Tensor, temperature: float) -> float:
    scaled = logits.double().numpy() / temperature
    if task == "multiclass":
        score = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return log_loss(labels, score / score.sum(axis=1, keepdims=True))
    return log_loss(labels.numpy().ravel(), 1 / (1 + np.exp(-scaled.ravel())), labels=[0, 1])


@pytest.mark.parametrize("sureness", [0.4, 3.0])
@pytest.mark.parametrize("task", TASKS)
def test_no_temperature_of_a_grid_is_better(task: Any, sureness: float) -> None:
    logits, labels = made(task, sureness)
    found = fit_temperature(task, logits, labels)
    grid = np.geomspace(LOWEST, HIGHEST, 2000)
    losses = [sklearn_loss(task, logits, labels, temperature) for temperature in grid]
    assert sklearn_loss(task, logits, labels, found) <= min(losses) + 1e-9
    assert found == pytest.approx(grid[np.argmin(losses)], rel=0.01)
    assert found == pytest.approx(sureness, rel=0.25)  # what the labels were drawn with


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_is_that_of_scikit_learn(task: Any) -> None:
    logits, labels = made(task, 2.0)
    assert negative_log_likelihood(task, logits, labels) == pytest.approx(sklearn_loss(task, logits, labels, 1.0))


def test_the_temperature_is_bounded_where_the_likelihood_has_no_end() -> None:
    labels = torch.tensor([0.0, 0.0, 1.0, 1.0])
    logits = torch.tensor([[-1.0], [-0.5], [0.5], [1.0]])
    assert fit_temperature("binary", logits, labels) == pytest.approx(LOWEST, rel=1e-3)
    assert fit_temperature("binary", logits, 1 - labels) == pytest.approx(HIGHEST, rel=1e-3)
    assert fit_temperature("binary", logits * 1e4, labels) >= LOWEST  # nothing overflows
    one_class = fit_temperature("binary", logits, torch.ones(4))
    assert LOWEST <= one_class <= HIGHEST


def plain_error(confidence: list[float], right: list[bool]) -> float:
    """Bins of width 1/15, one loop."""
    total = 0.0
    for number in range(15):
        inside = [i for i, value in enumerate(confidence) if number / 15 < value <= (number + 1) / 15]
        if inside:
            mean = sum(confidence[i] for i in inside) / len(inside)
            share = sum(right[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(mean - share)
    return total


@pytest.mark.parametrize("task", TASKS)
def test_the_calibration_error_is_that_of_a_loop_over_bins(task: Any) -> None:
    logits, labels = made(task, 3.0)
    if task == "multiclass":
        score = logits.softmax(dim=1)
        confidence, right = score.max(dim=1).values.tolist(), (score.argmax(dim=1) == labels).tolist()
    else:
        confidence, right = logits.sigmoid().flatten().tolist(), (labels.flatten() > 0.5).tolist()
    found = expected_calibration_error(task, logits, labels)
    assert found == pytest.approx(plain_error(confidence, right), abs=1e-5)
    assert expected_calibration_error(task, logits / 3, labels) < found


def test_a_regression_has_no_probabilities() -> None:
    with pytest.raises(ConfigError, match=r"hpo\.calibration: expected null, as a regression has no probabilities"):
        check_has_probabilities("regression")
