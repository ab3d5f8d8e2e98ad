"""All metrics of a task, by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import functional as M
from torchmetrics.retrieval import RetrievalMAP, RetrievalMRR

from lightning_bge.models.metrics.class_path import compute_class
from lightning_bge.models.metrics.decisions import metric_of_counts
from lightning_bge.models.metrics.names import DECISION_METRICS, METRICS, Metric, fixed_precision, metric_name
from lightning_bge.models.metrics.predictions import Predictions, scores
from lightning_bge.types import Schema, Task


def compute_metrics(
    schema: Schema, predictions: Predictions, per_class: bool = False, monitored: Metric | None = None
) -> dict[str, float]:
    """The usual metrics of the task, and the monitored one. Those of several classes are macro averages over them.

    Ranking metrics (auroc, average_precision) are left out where only one class is present, and `map` and `mrr` where
    there are no groups; groups without a yes are left out, as TREC's evaluation does. Where a logit is not finite,
    every metric is NaN: a model that has diverged must not count as one that answers no.

    Args:
        schema: task, label names and threshold.
        predictions: with labels.
        per_class: adds `f1/<label>`, `precision/<label>`, `recall/<label>` (multi-class and multi-label).
        monitored: a metric that is added, where it is not a usual one. The loss is not computed here.

    Raises:
        ConfigError: a class of torchmetrics can't be computed of such scores and labels.
    """
    assert predictions.labels is not None
    more = None if monitored is None or monitored == "loss" else metric_name(monitored)
    if not predictions.logits.isfinite().all():
        usual = METRICS[schema.task][: METRICS[schema.task].index("loss") + 1]
        return dict.fromkeys([*usual, *([] if more is None else [more])], float("nan"))
    score = scores(schema.task, predictions.logits)
    labels = predictions.labels
    if schema.task == "regression":
        found = _regression(score, labels)
    elif schema.task == "binary":
        found = _binary(score, labels.long(), schema.threshold, predictions.groups)
    else:
        found = _several_classes(schema, score, labels.long(), per_class)
    if isinstance(monitored, dict):
        found[metric_name(monitored)] = compute_class(monitored, schema, score, labels, predictions.groups)
    elif more is not None and more not in found:
        found |= _further(schema, score, labels.long(), more)
    return {name: float(value) for name, value in found.items()}


def _further(schema: Schema, score: Tensor, labels: Tensor, metric: str) -> dict[str, float]:
    """A metric that is not computed with the others; empty where these labels do not have it."""
    if metric in DECISION_METRICS:
        decided = score.argmax(dim=-1) if schema.task == "multiclass" else (score >= schema.threshold).long()
        return {metric: further_decision_metric(metric, schema, decided, labels)}
    percent = fixed_precision(metric)
    if percent is not None and 0 < int(labels.sum()) < len(labels):
        return {metric: recall_at_precision(score.numpy(), labels.numpy(), percent)}
    return {}


def further_decision_metric(metric: str, schema: Schema, decided: Tensor, labels: Tensor) -> float:
    """One of `DECISION_METRICS` of decided classes, [N] (binary, multi-class) or [N, L] of 0 and 1."""
    if schema.task == "multiclass":
        classes = torch.arange(len(schema.labels))
        decided, labels = decided[:, None] == classes, labels[:, None] == classes
    yes, positive = (each.reshape(len(labels), -1).double().numpy() for each in (decided, labels))
    counts = {"hits": (yes * positive).sum(0), "yes": yes.sum(0), "positive": positive.sum(0)}
    return float(metric_of_counts(metric, schema.task, **counts, rows=np.array(float(len(labels)))))


def recall_at_precision(score: np.ndarray, labels: np.ndarray, percent: int) -> float:
    """The highest recall of any threshold at which at least so many per cent of the yes are right; 0 where none is.

    Args:
        score: [N]; rows of one score go together.
        labels: 0 or 1, [N], with a 1.
        percent: of precision.
    """
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(labels[order] > 0.5)
    ends = np.append(np.diff(score[order]) != 0, True)
    enough = ends & (100 * hits >= percent * np.arange(1, len(hits) + 1))
    return float(hits[enough].max(initial=0) / hits[-1])


def _regression(score: Tensor, labels: Tensor) -> dict[str, Any]:
    score, labels = score.double(), labels.double()  # torchmetrics gives NaN for small variances in fp32
    found = {"mse": M.mean_squared_error(score, labels), "mae": M.mean_absolute_error(score, labels)}
    # a correlation of constants is not defined; early in training every score may be the same
    constant = bool((score == score[0]).all()) or bool((labels == labels[0]).all())
    nothing = torch.zeros(())
    found["spearman"] = nothing if constant else M.spearman_corrcoef(score, labels)
    found["pearson"] = nothing if constant else M.pearson_corrcoef(score, labels)
    if len(labels) > 1:
        found["r2"] = M.r2_score(score, labels)
    return found


def _binary(score: Tensor, labels: Tensor, threshold: float, groups: Tensor | None) -> dict[str, Any]:
    found = decision_metrics("binary", (score >= threshold).long(), labels)  # torchmetrics' threshold is exclusive
    if 0 < int(labels.sum()) < len(labels):
        found["auroc"] = M.auroc(score, labels, task="binary")
        found["average_precision"] = M.average_precision(score, labels, task="binary")
        if groups is not None:
            found["map"] = RetrievalMAP(empty_target_action="skip")(score, labels, indexes=groups)
            found["mrr"] = RetrievalMRR(empty_target_action="skip")(score, labels, indexes=groups)
    return found


def _several_classes(schema: Schema, score: Tensor, labels: Tensor, per_class: bool) -> dict[str, Any]:
    classes = len(schema.labels)
    if schema.task == "multiclass":
        task: dict[str, Any] = {"task": "multiclass", "num_classes": classes}
        decided = score.argmax(dim=-1)
        present = len(labels.unique()) == classes
    else:
        task = {"task": "multilabel", "num_labels": classes}
        decided = (score >= schema.threshold).long()
        present = bool(((labels.sum(0) > 0) & (labels.sum(0) < len(labels))).all())
    found = decision_metrics(schema.task, decided, labels, schema.labels, per_class)
    if present:
        found["auroc"] = M.auroc(score, labels, average="macro", **task)
        found["average_precision"] = M.average_precision(score, labels, average="macro", **task)
    return found


def decision_metrics(
    task: Task, decided: Tensor, labels: Tensor, names: Sequence[str] = (), per_class: bool = False
) -> dict[str, Any]:
    """F1, accuracy, precision and recall of decided classes, [N] (binary, multi-class) or [N, L] of 0 and 1."""
    functions = (("f1", M.f1_score), ("precision", M.precision), ("recall", M.recall))
    if task == "binary":
        found: dict[str, Any] = {name: function(decided, labels, task="binary") for name, function in functions}
        return found | {"accuracy": M.accuracy(decided, labels, task="binary")}
    kind: dict[str, Any] = {"task": task, "num_classes" if task == "multiclass" else "num_labels": len(names)}
    found = {"accuracy": M.accuracy(decided, labels, average="micro" if task == "multiclass" else "macro", **kind)}
    for name, function in functions:
        each = function(decided, labels, average="none", **kind)
        found[name] = each.mean()
        if per_class:
            found |= {f"{name}/{label}": value for label, value in zip(names, each, strict=True)}
    return found
