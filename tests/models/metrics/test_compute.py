"""Metrics against scikit-learn, scipy and slow plain versions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk
from torch import Tensor

from lightning_bge.errors import ConfigError
from lightning_bge.models.metrics.compute import compute_metrics
from lightning_bge.models.metrics.config import MonitorConfig, check_monitor
from lightning_bge.models.metrics.names import DECISION_METRICS, METRICS, USUAL_DECISIONS, metric_direction
from lightning_bge.models.metrics.predictions import Predictions, scores
from lightning_bge.models.metrics.threshold import (
    best_threshold,
    cross_fitted_decisions,
    threshold_parts,
    tuned_metrics,
)
from lightning_bge.types import TASKS, Schema, Task

N = 60
BINARY = Schema("binary", ("no", "yes"), ("a", "b"), 32, threshold=0.4)
CLASSES = Schema("multiclass", ("x", "y", "z"), ("a",), 32)
LABELS = Schema("multilabel", ("x", "y", "z"), ("a",), 32, threshold=0.6)
NUMBER = Schema("regression", (), ("a",), 32)


def predictions(logits: Tensor, labels: Tensor, groups: Tensor | None = None) -> Predictions:
    return Predictions(torch.arange(len(logits)), logits, labels, groups)


def binary_predictions() -> Predictions:
    labels = (torch.rand(N) < 0.3).float()
    return predictions(torch.randn(N, 1) + labels[:, None], labels)


def test_scores_are_what_a_user_reads() -> None:
    logits = torch.randn(5, 3)
    torch.testing.assert_close(scores("binary", logits[:, :1]), 1 / (1 + (-logits[:, 0]).exp()))
    torch.testing.assert_close(scores("multilabel", logits), 1 / (1 + (-logits).exp()))
    torch.testing.assert_close(scores("multiclass", logits), logits.exp() / logits.exp().sum(1, keepdim=True))
    assert torch.equal(scores("regression", logits[:, :1]), logits[:, 0])
    assert scores("binary", logits[:, :1].bfloat16()).dtype == torch.float32


def test_binary() -> None:
    found = binary_predictions()
    y, p = found.labels.numpy(), scores("binary", found.logits).numpy()
    yes = p >= 0.4
    assert compute_metrics(BINARY, found) == pytest.approx(
        {
            "f1": sk.f1_score(y, yes),
            "accuracy": sk.accuracy_score(y, yes),
            "precision": sk.precision_score(y, yes),
            "recall": sk.recall_score(y, yes),
            "auroc": sk.roc_auc_score(y, p),
            "average_precision": sk.average_precision_score(y, p),
        },
        rel=1e-6,
    )


def test_a_score_at_the_threshold_is_a_yes() -> None:
    found = predictions(torch.zeros(4, 1), torch.tensor([1.0, 1, 1, 0]))
    assert compute_metrics(replace(BINARY, threshold=0.5), found)["recall"] == 1


@pytest.mark.parametrize("per_class", [False, True])
def test_multiclass(per_class: bool) -> None:
    labels = torch.randint(0, 3, (N,))
    logits = torch.randn(N, 3) + torch.nn.functional.one_hot(labels, 3)
    y, p = labels.numpy(), logits.softmax(1).double().numpy()
    decided = p.argmax(1)
    expected = {
        "accuracy": sk.accuracy_score(y, decided),
        "auroc": sk.roc_auc_score(y, p / p.sum(1, keepdims=True), multi_class="ovr"),
        "average_precision": sk.average_precision_score(np.eye(3)[y], p, average="macro"),
    }
    for name, function in (("f1", sk.f1_score), ("precision", sk.precision_score), ("recall", sk.recall_score)):
        expected[name] = function(y, decided, average="macro")
        if per_class:
            each = function(y, decided, average=None)
            expected |= {f"{name}/{label}": value for label, value in zip("xyz", each, strict=True)}
    assert compute_metrics(CLASSES, predictions(logits, labels), per_class) == pytest.approx(expected, rel=1e-5)


def test_multiclass_where_a_class_never_comes() -> None:
    labels = torch.randint(0, 2, (N,))
    logits = torch.randn(N, 3)
    found = compute_metrics(CLASSES, predictions(logits, labels))
    expected = sk.f1_score(labels.numpy(), logits.argmax(1).numpy(), labels=range(3), average="macro", zero_division=0)
    assert found["f1"] == pytest.approx(expected, rel=1e-6)
    assert not {"auroc", "average_precision"} & found.keys()


@pytest.mark.parametrize("per_class", [False, True])
def test_multilabel(per_class: bool) -> None:
    labels = (torch.rand(N, 3) < 0.4).float()
    logits = torch.randn(N, 3) + labels
    y, p = labels.numpy(), logits.sigmoid().numpy()
    decided = (p >= 0.6).astype(int)
    expected = {
        "accuracy": float((decided == y).mean()),
        "auroc": sk.roc_auc_score(y, p, average="macro"),
        "average_precision": sk.average_precision_score(y, p, average="macro"),
    }
    for name, function in (("f1", sk.f1_score), ("precision", sk.precision_score), ("recall", sk.recall_score)):
        expected[name] = function(y, decided, average="macro")
        if per_class:
            each = function(y, decided, average=None)
            expected |= {f"{name}/{label}": value for label, value in zip("xyz", each, strict=True)}
    assert compute_metrics(LABELS, predictions(logits, labels), per_class) == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------ metrics that are computed where they are monitored


def further(task: Task, metric: str, y: np.ndarray, decided: np.ndarray) -> float:
    average = {"f1_micro": "micro", "f1_weighted": "weighted"}.get(metric, "binary" if task == "binary" else "macro")
    if metric == "mcc":
        return sk.matthews_corrcoef(y, decided)
    if metric == "kappa":
        return sk.cohen_kappa_score(y, decided)
    beta = {"f0.5": 0.5, "f2": 2.0}.get(metric, 1.0)
    return sk.fbeta_score(y, decided, beta=beta, average=average, zero_division=0)


FURTHER = [
    (task, metric)
    for task in ("binary", "multiclass", "multilabel")
    for metric in METRICS[task]
    if metric in DECISION_METRICS and metric not in USUAL_DECISIONS
]


@pytest.mark.parametrize(("task", "metric"), FURTHER)
@pytest.mark.parametrize("constant", [False, True])
def test_further_decisions_equal_scikit_learn(task: Task, metric: str, constant: bool) -> None:
    schema = {"binary": BINARY, "multiclass": CLASSES, "multilabel": LABELS}[task]
    labels = torch.randint(3, (N,)) if task == "multiclass" else (torch.rand(N, schema.num_outputs) < 0.3).float()
    logits = torch.randn(N, schema.num_outputs) + (0 if task == "multiclass" else labels)
    if constant:
        logits = torch.full_like(logits, -5.0)
        logits[:, 0] += 1
    labels = labels.squeeze(-1) if task == "binary" else labels
    score = scores(task, logits).numpy()
    decided = score.argmax(1) if task == "multiclass" else (score >= schema.threshold).astype(int)
    found = compute_metrics(schema, predictions(logits, labels), monitored=metric)[metric]
    assert found == pytest.approx(further(task, metric, labels.numpy(), decided), abs=1e-9)


@pytest.mark.parametrize(("task", "metric"), [(task, metric) for task, metric in FURTHER if task != "multiclass"])
def test_further_decisions_at_a_tuned_threshold(task: Task, metric: str) -> None:
    schema = {"binary": BINARY, "multilabel": LABELS}[task]
    labels = (torch.rand(N, schema.num_outputs) < 0.3).float()
    logits = torch.randn(N, schema.num_outputs) + labels
    labels = labels.squeeze(-1) if task == "binary" else labels
    found = predictions(logits, labels)
    best = metric if metric in ("f0.5", "f2", "mcc", "kappa") else "f1"
    decided = cross_fitted_decisions(scores(task, logits).numpy(), labels.numpy(), threshold_parts(N), best)
    expected = further(task, metric, labels.numpy(), decided)
    assert tuned_metrics(schema, found, monitored=metric)[metric] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("percent", [1, 50, 70, 90, 99])
@pytest.mark.parametrize("ties", [False, True])
def test_recall_at_a_precision_equals_scikit_learn(percent: int, ties: bool) -> None:
    found = binary_predictions()
    if ties:
        found = replace(found, logits=found.logits.round())
    metric = f"recall_at_precision_{percent}"
    precision, recall, _ = sk.precision_recall_curve(found.labels, scores("binary", found.logits))
    expected = recall[precision >= percent / 100].max()
    assert compute_metrics(BINARY, found, monitored=metric)[metric] == pytest.approx(expected)
    assert check_monitor(MonitorConfig(metric), "binary") == MonitorConfig(metric, threshold="fixed")


@pytest.mark.parametrize("metric", ["recall_at_precision_0", "recall_at_precision_100", "recall_at_precision_9.5"])
def test_a_precision_is_a_per_cent(metric: str) -> None:
    with pytest.raises(ConfigError, match=r"monitor\.metric"):
        check_monitor(MonitorConfig(metric), "binary")


def test_further_metrics_of_a_diverged_model_are_nan() -> None:
    found = binary_predictions()
    found.logits[0] = float("nan")
    assert np.isnan(compute_metrics(BINARY, found, monitored="mcc")["mcc"])
    assert np.isnan(tuned_metrics(BINARY, found, monitored="mcc")["mcc"])


def test_regression() -> None:
    labels = torch.randn(N).round(decimals=1)  # with ties
    logits = (labels + torch.randn(N))[:, None].round(decimals=1)
    y, p = labels.double().numpy(), logits[:, 0].double().numpy()
    assert compute_metrics(NUMBER, predictions(logits, labels)) == pytest.approx(
        {
            "mse": sk.mean_squared_error(y, p),
            "mae": sk.mean_absolute_error(y, p),
            "spearman": stats.spearmanr(y, p).statistic,
            "pearson": stats.pearsonr(y, p).statistic,
            "r2": sk.r2_score(y, p),
        },
        rel=1e-6,
    )


def test_correlation_of_scores_that_hardly_differ() -> None:
    """One far value among thousands of near ones: too little variance for fp32."""
    labels = torch.rand(5000)
    logits = 0.5 + 1e-3 * labels[:, None]
    logits[7] = 1.5
    found = compute_metrics(NUMBER, predictions(logits, labels))
    expected = stats.pearsonr(labels.double(), logits[:, 0].double()).statistic
    assert found["pearson"] == pytest.approx(expected, rel=1e-6)


def test_correlation_with_a_constant_is_zero() -> None:
    labels = torch.randn(N)
    assert compute_metrics(NUMBER, predictions(torch.full((N, 1), 0.3), labels))["spearman"] == 0
    assert compute_metrics(NUMBER, predictions(labels[:, None], torch.full((N,), 2.0)))["pearson"] == 0
    one = compute_metrics(NUMBER, predictions(torch.zeros(1, 1), torch.ones(1)))
    assert one == {"mse": 1.0, "mae": 1.0, "spearman": 0.0, "pearson": 0.0}


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_leaves_the_ranking_out(label: float) -> None:
    groups = torch.arange(N) // 5
    found = compute_metrics(BINARY, predictions(torch.randn(N, 1), torch.full((N,), label), groups))
    assert found.keys() == {"f1", "accuracy", "precision", "recall"}


def test_multilabel_without_a_yes_for_one_label_leaves_the_ranking_out() -> None:
    labels = (torch.rand(N, 3) < 0.5).float()
    labels[:, 1] = 0
    found = compute_metrics(LABELS, predictions(torch.randn(N, 3), labels))
    assert found.keys() == {"f1", "accuracy", "precision", "recall"}


def slow_ranking(score: list[float], labels: list[float], groups: list[int]) -> tuple[float, float]:
    """Mean average precision and mean reciprocal rank over the groups that hold a yes."""
    precisions, reciprocals = [], []
    for group in sorted(set(groups)):
        rows = [row for row in range(len(groups)) if groups[row] == group]
        ranked = sorted(rows, key=lambda row: -score[row])
        hits = [rank for rank, row in enumerate(ranked, start=1) if labels[row]]
        if hits:
            precisions.append(sum(number / rank for number, rank in enumerate(hits, start=1)) / len(hits))
            reciprocals.append(1 / hits[0])
    return sum(precisions) / len(precisions), sum(reciprocals) / len(reciprocals)


def test_map_and_mrr_of_groups_of_unequal_size() -> None:
    groups = torch.tensor([0] * 7 + [5] * 1 + [2] * 12 + [9] * 4)[torch.randperm(24)]
    labels = (torch.rand(24) < 0.3).float()
    labels[groups == 9] = 0  # without a yes: passed over
    logits = torch.randperm(24)[:, None] / 24.0
    found = compute_metrics(BINARY, predictions(logits, labels, groups))
    expected = slow_ranking(logits[:, 0].tolist(), labels.tolist(), groups.tolist())
    assert (found["map"], found["mrr"]) == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------ thresholds


def quality(metric: str, decided: np.ndarray, truth: np.ndarray) -> float:
    if metric == "accuracy":
        return float((decided == truth).mean())
    if metric in ("mcc", "kappa"):
        return further("binary", metric, truth, decided) if len(set(truth)) > 1 else 0.0
    hits, square = (decided & truth).sum(), {"f1": 1, "f0.5": 0.25, "f2": 4}[metric]
    return (1 + square) * hits / max(decided.sum() + square * truth.sum(), 1e-9)


NEAR = float(np.nextafter(np.float32(0.5), np.float32(1)))
SCORES = st.one_of(st.sampled_from([0.0, 0.25, 0.5, NEAR, 1.0]), st.floats(0, 1, width=32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("metric", ["f1", "accuracy", "f0.5", "f2", "mcc", "kappa"])
@settings(deadline=None, max_examples=80, derandomize=True)
@given(rows=st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=12))
def test_best_threshold_is_the_best_of_all(metric: str, dtype: type, rows: list[tuple[float, bool]]) -> None:
    score, truth = np.array([s for s, _ in rows], dtype=dtype), np.array([t for _, t in rows])
    everywhere = [*score, np.inf]
    best = max(quality(metric, score >= threshold, truth) for threshold in everywhere)
    if metric in ("mcc", "kappa") and len(set(truth)) < 2:
        return
    threshold = best_threshold(score, truth.astype(np.float32), metric)
    assert quality(metric, score >= threshold, truth) == pytest.approx(best)
    # the same in torch, which is what the decisions are made with
    assert np.array_equal(score >= threshold, (torch.from_numpy(score) >= threshold).numpy())


def test_best_threshold_is_half_way_between_scores() -> None:
    assert best_threshold(np.array([0.2, 0.9, 0.6]), np.array([0, 1, 1])) == pytest.approx(0.4)


def test_best_threshold_of_equal_scores_takes_all_of_them() -> None:
    score = np.array([0.5, 0.5, 0.5, 0.1])
    assert (score >= best_threshold(score, np.array([1, 0, 1, 0]))).tolist() == [True, True, True, False]


def test_best_threshold_is_above_all_scores_where_a_no_for_every_row_is_best() -> None:
    score = np.array([1.0, 0.8, 0.1], dtype=np.float32)
    assert not (score >= best_threshold(score, np.array([0, 0, 1]), "accuracy")).any()


@pytest.mark.parametrize("metric", ["f1", "accuracy", "f2"])
def test_several_labels_have_one_threshold_by_the_mean_that_is_reported(metric: str) -> None:
    score, labels = np.random.default_rng(0).random((20, 3)), np.random.default_rng(1).random((20, 3)) < [0.1, 0.4, 0.8]
    rows = torch.arange(20)

    def at(threshold: float) -> float:
        schema = Schema("multilabel", ("a", "b", "c"), ("text",), 8, threshold)
        found = Predictions(rows, torch.logit(torch.from_numpy(score)), torch.from_numpy(labels).float())
        return compute_metrics(schema, found, monitored=metric)[metric]

    best = max(at(threshold) for threshold in [*np.unique(score), 2.0])
    assert at(best_threshold(score, labels, metric)) == pytest.approx(best)


# ------------------------------------------------------------------ predictions and names


def test_collect_sorts_by_row() -> None:
    rows = torch.randperm(10)
    whole = Predictions(rows, rows[:, None] * 1.0, rows * 2.0, rows // 2)
    parts = [
        Predictions(whole.rows[s], whole.logits[s], whole.labels[s], whole.groups[s])
        for s in (slice(0, 3), slice(3, 4), slice(4, 10))
    ]
    found = Predictions.collect(parts)
    assert found.rows.tolist() == list(range(10))
    assert found.logits[:, 0].tolist() == list(range(10))
    assert found.labels.tolist() == list(range(0, 20, 2))
    assert found.groups.tolist() == [row // 2 for row in range(10)]


def test_collect_without_labels_and_groups() -> None:
    found = Predictions.collect([Predictions(torch.tensor([1, 0]), torch.tensor([[3.0], [4.0]]))])
    assert (found.logits[:, 0].tolist(), found.labels, found.groups) == ([4.0, 3.0], None, None)


@pytest.mark.parametrize("task", TASKS)
def test_every_metric_is_known_and_computed(task: Task) -> None:
    schema = {"binary": BINARY, "multiclass": CLASSES, "multilabel": LABELS, "regression": NUMBER}[task]
    labels = {
        "binary": (torch.arange(N) % 2).float(),
        "multiclass": torch.arange(N) % 3,
        "multilabel": (torch.arange(3 * N).reshape(N, 3) % 2).float(),
        "regression": torch.randn(N),
    }[task]
    logits = torch.randn(N, schema.num_outputs)
    found = compute_metrics(schema, predictions(logits, labels, torch.arange(N) // 6))
    usual = METRICS[task][: METRICS[task].index("loss")]
    assert found.keys() == set(usual)
    for metric in METRICS[task]:
        assert check_monitor(MonitorConfig(metric), task).metric == metric
        again = compute_metrics(schema, predictions(logits, labels, torch.arange(N) // 6), monitored=metric)
        assert again.keys() - found.keys() == (set() if metric in (*usual, "loss") else {metric})


def test_default_metrics_and_directions() -> None:
    found = {task: check_monitor(MonitorConfig(), task).metric for task in TASKS}  # type: ignore[arg-type]
    assert found == {"binary": "f1", "multiclass": "f1", "multilabel": "f1", "regression": "spearman"}
    assert {name: metric_direction(name) for name in ("f1", "map", "spearman", "loss", "mse", "mae")} == {
        "f1": "maximize",
        "map": "maximize",
        "spearman": "maximize",
        "loss": "minimize",
        "mse": "minimize",
        "mae": "minimize",
    }


def test_metric_that_cannot_be_watched() -> None:
    with pytest.raises(ConfigError, match=r"monitor\.metric: a regression task has spearman, .*; got f1"):
        check_monitor(MonitorConfig("f1"), "regression")
    with pytest.raises(ConfigError, match=r"map ranks the rows of each group; name data\.group_column"):
        check_monitor(MonitorConfig("map"), "binary", grouped=False)
    with pytest.raises(ConfigError, match=r"monitor\.patience: expected 1 or more, or null, got 0"):
        MonitorConfig(patience=0)
