"""Counts at candidate thresholds equal torchmetrics on the repeated rows."""

import numpy as np
import pytest
import torch
from scipy.special import expit

from lightning_bge.hpo.evaluation.decision_counts import MAX_THRESHOLDS, Decider, count_decisions, cross_fitted, sum_of
from lightning_bge.models.metrics.compute import compute_metrics
from lightning_bge.models.metrics.names import DECISION_METRICS, METRICS
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.models.metrics.threshold import best_threshold, threshold_parts, tuned_metrics
from lightning_bge.types import Schema, Task
from tests.hpo.evaluation.test_resampled_metrics import NAMES, repeated, rows_of

N, B = 60, 5
WEIGHTS = np.random.default_rng(1).multinomial(N, np.full(N, 1 / N), size=B).T.astype(np.float32)
TUNED: tuple[Task, ...] = ("binary", "multilabel")


def decisions_of(*tasks: Task) -> list[tuple[Task, str]]:
    return [(task, metric) for task in tasks for metric in METRICS[task] if metric in DECISION_METRICS]


@pytest.mark.parametrize(("task", "metric"), decisions_of("binary", "multilabel", "multiclass"))
def test_decisions_at_a_fixed_threshold(task: Task, metric: str) -> None:
    logits, labels = rows_of(task)
    [counts] = count_decisions(Decider.fixed(task), logits, labels, WEIGHTS)
    expected = [repeated(task, metric, logits, labels, WEIGHTS[:, one]) for one in range(B)]
    assert counts.metric(metric, task)[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("task", TUNED)
@pytest.mark.parametrize("metric", ["f1", "accuracy", "f0.5", "f2"])
def test_the_chosen_threshold_is_as_good_as_the_best_of_all(task: Task, metric: str) -> None:
    logits, labels = rows_of(task)
    [counts] = count_decisions(Decider.candidates(task, logits, labels), logits, labels, WEIGHTS)
    found = counts.at(counts.best(metric, task)).metric(metric, task)[0]
    for one in range(B):
        rows = np.repeat(np.arange(N), WEIGHTS[:, one].astype(int))
        score = expit(logits[rows]).reshape(labels[rows].shape)
        threshold = best_threshold(score, labels[rows], metric)
        schema = Schema(task, NAMES[task], ("text",), 8, threshold)
        parts = (torch.from_numpy(each[rows]) for each in (logits, labels))
        expected = compute_metrics(schema, Predictions(torch.arange(len(rows)), *parts), monitored=metric)
        assert found[one] == pytest.approx(expected[metric], abs=1e-6)


@pytest.mark.parametrize(("task", "metric"), decisions_of(*TUNED))
def test_cross_fitted_values_are_those_that_a_validation_logs(task: Task, metric: str) -> None:
    logits, labels = rows_of(task)
    logits = logits + np.linspace(0, 1e-3, N * logits.shape[1], dtype=np.float32).reshape(logits.shape)  # no ties
    everything = np.ones((N, 1), np.float32)
    decider = Decider.candidates(task, logits, labels)
    parts = count_decisions(decider, logits, labels, everything, threshold_parts(N))
    schema = Schema(task, NAMES[task], ("text",), 8)
    predictions = Predictions(torch.arange(N), torch.from_numpy(logits), torch.from_numpy(labels))
    logged = tuned_metrics(schema, predictions, monitored=metric)
    # a validation's threshold lies half way to the next score, the candidate at the positive row itself
    near = 0.1 if metric in ("mcc", "kappa") else 0.05  # which change more with a row
    assert cross_fitted(parts, metric, task) == pytest.approx(logged[metric], abs=near)


def test_counts_of_parts_add_up() -> None:
    logits, labels = rows_of("binary")
    decider = Decider.candidates("binary", logits, labels)
    parts = count_decisions(decider, logits, labels, WEIGHTS, threshold_parts(N))
    [whole] = count_decisions(decider, logits, labels, WEIGHTS)
    for name, value in vars(sum_of(parts)).items():
        assert np.array_equal(value, vars(whole)[name])


def test_candidates_are_few_and_span_the_positive_rows() -> None:
    logits = np.random.default_rng(0).normal(size=(5000, 1))
    labels = (logits[:, 0] > 0).astype(np.float32)
    found = Decider.candidates("binary", logits, labels).thresholds
    assert len(found) == MAX_THRESHOLDS + 1
    assert found[0] == np.inf
    assert (found[1], found[-1]) == (logits.max(), logits[logits > 0].min())


def test_a_no_for_every_row_is_a_candidate() -> None:
    logits, labels = np.array([[3.0], [2.0], [1.0]]), np.array([0.0, 0.0, 1.0])
    decider = Decider.candidates("binary", logits, labels)
    [counts] = count_decisions(decider, logits, labels, np.ones((3, 1), np.float32))
    assert counts.at(counts.best("accuracy", "binary")).yes.sum() == 0
