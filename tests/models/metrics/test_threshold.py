"""Thresholds that are tuned on other rows than those that they decide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from lightning_bge.errors import ConfigError
from lightning_bge.models.metrics.config import MonitorConfig, check_monitor
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.models.metrics.threshold import (
    THRESHOLD_PARTS,
    best_threshold,
    cross_fitted_decisions,
    threshold_parts,
    tuned_metrics,
)
from lightning_bge.types import Schema

SCHEMA = Schema("binary", ("no", "yes"), ("text",), 8)


@pytest.mark.parametrize("shape", [(30,), (30, 3)])
def test_cross_fitted_decisions_do_not_see_their_own_part(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    score = random.random(shape)
    labels = (random.random(shape) < score).astype(float)
    parts = random.permutation(30) % 3
    decided = cross_fitted_decisions(score, labels, parts)
    assert decided.shape == shape
    for part in range(3):
        fold, others = np.flatnonzero(parts == part), np.flatnonzero(parts != part)
        threshold = best_threshold(score[others], labels[others])
        assert np.array_equal(decided[fold], score[fold] >= threshold)
        other_truth = labels.copy()
        other_truth[fold] = 1 - labels[fold]
        again = cross_fitted_decisions(score, other_truth, parts)
        assert np.array_equal(again[fold], decided[fold])
        assert not np.array_equal(again[others], decided[others])


def test_a_single_part_is_decided_at_its_own_best_threshold() -> None:
    score, labels = np.array([0.1, 0.4, 0.6]), np.array([0, 1, 1])
    assert cross_fitted_decisions(score, labels, np.zeros(3, dtype=int)).tolist() == [0, 1, 1]


def predictions(count: int, seed: int, groups: bool = False) -> Predictions:
    random = np.random.default_rng(seed)
    labels = (random.random(count) < 0.3).astype(np.float32)
    logits = (labels + random.normal(size=count)).astype(np.float32)[:, None]
    found = torch.arange(count) // 4 if groups else None
    return Predictions(torch.arange(count), torch.from_numpy(logits), torch.from_numpy(labels), found)


@pytest.mark.parametrize("groups", [False, True])
def test_parts_are_even_and_groups_are_in_one_of_them(groups: bool) -> None:
    numbers = np.arange(100) // 4
    parts = threshold_parts(100, numbers if groups else None)
    assert np.array_equal(parts, threshold_parts(100, numbers if groups else None))
    assert np.bincount(parts).tolist() == [20] * THRESHOLD_PARTS
    if groups:
        assert all(len(set(parts[numbers == group])) == 1 for group in range(25))


def test_fewer_rows_than_parts() -> None:
    assert sorted(threshold_parts(3)) == [0, 1, 2]
    assert tuned_metrics(SCHEMA, predictions(3, 0)).keys() == {"f1", "accuracy", "precision", "recall"}


@pytest.mark.parametrize("groups", [False, True])
def test_tuned_metrics_are_those_of_the_cross_fitted_decisions(groups: bool) -> None:
    found = predictions(80, 1, groups)
    assert found.labels is not None
    score, truth = found.logits.squeeze(-1).sigmoid().numpy(), found.labels.numpy()
    parts = threshold_parts(80, None if found.groups is None else found.groups.numpy())
    decided = cross_fitted_decisions(score, truth, parts, "f1")
    by_accuracy = cross_fitted_decisions(score, truth, parts, "accuracy")
    expected = {
        "f1": f1_score(truth, decided),
        "precision": precision_score(truth, decided),
        "recall": recall_score(truth, decided),
        "accuracy": accuracy_score(truth, by_accuracy),
    }
    assert tuned_metrics(SCHEMA, found) == pytest.approx(expected)


def test_with_other_rows_the_threshold_is_the_best_one_of_these() -> None:
    found, others = predictions(80, 1), predictions(50, 2)
    assert found.labels is not None
    assert others.labels is not None
    threshold = best_threshold(others.logits.squeeze(-1).sigmoid().numpy(), others.labels.numpy())
    decided = found.logits.squeeze(-1).sigmoid().numpy() >= threshold
    assert tuned_metrics(SCHEMA, found, others)["f1"] == pytest.approx(f1_score(found.labels.numpy(), decided))


def test_a_diverged_model_has_no_tuned_value() -> None:
    found = predictions(10, 0)
    found.logits[3] = float("inf")
    assert all(np.isnan(value) for value in tuned_metrics(SCHEMA, found).values())


def test_only_yes_no_decisions_are_monitored_at_a_tuned_threshold() -> None:
    assert check_monitor(MonitorConfig(), "binary") == MonitorConfig("f1", threshold="tuned")
    assert check_monitor(MonitorConfig("f2"), "multilabel").threshold == "tuned"
    assert check_monitor(MonitorConfig("f1", threshold="fixed"), "binary") == MonitorConfig("f1", threshold="fixed")
    for task, metric in (("binary", "auroc"), ("multiclass", "f1"), ("regression", None)):
        assert check_monitor(MonitorConfig(metric), task).threshold == "fixed"  # type: ignore[arg-type]
    assert MonitorConfig("f1").logged == "val_tuned_f1"
    assert MonitorConfig("f1", threshold="fixed").logged == "val_f1"
    assert MonitorConfig("auroc").logged == "val_auroc"
    with pytest.raises(ConfigError, match=r"monitor\.threshold: expected tuned or fixed, got 'best'"):
        MonitorConfig("f1", threshold="best")  # type: ignore[arg-type]
