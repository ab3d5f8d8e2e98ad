"""Scores, metrics and decision thresholds of each task, by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import functional as M
from torchmetrics.retrieval import RetrievalMAP, RetrievalMRR

from lightning_bge.errors import ConfigError
from lightning_bge.types import Schema, Task

# Each task's metrics; the first is monitored by default.
METRICS: dict[str, tuple[str, ...]] = {
    "binary": ("f1", "accuracy", "precision", "recall", "auroc", "average_precision", "map", "mrr", "loss"),
    "multiclass": ("f1", "accuracy", "precision", "recall", "auroc", "average_precision", "loss"),
    "multilabel": ("f1", "accuracy", "precision", "recall", "auroc", "average_precision", "loss"),
    "regression": ("spearman", "pearson", "mse", "mae", "r2", "loss"),
}
LOWER_IS_BETTER = ("loss", "mse", "mae")


@dataclass(frozen=True)
class MonitorConfig:
    """The metric of a run, and which epoch's value is its score.

    Attributes:
        metric: metric for early stopping, checkpoints and the study; null: f1, or spearman for a regression.
        objective: the score of a run is the value of its `best` or of its `last` epoch.
        patience: stop after this many epochs without a better value; null: never stop early.
    """

    metric: str | None = None
    objective: Literal["best", "last"] = "best"
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"monitor.patience: expected 1 or more, or null, got {self.patience}")


@dataclass(frozen=True)
class Predictions:
    """A model's outputs for some rows.

    Attributes:
        rows: int64 [N], row numbers in the file, ascending.
        logits: float32 [N, outputs].
        labels: as in `MicroBatch`, or None.
        groups: int64 [N], or None.
    """

    rows: Tensor
    logits: Tensor
    labels: Tensor | None = None
    groups: Tensor | None = None

    @classmethod
    def collect(cls, parts: Sequence[Predictions]) -> Predictions:
        """Join parts into one, sorted by row."""

        def join(name: str) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            return None if tensors[0] is None else torch.cat(tensors).cpu()[order]

        rows = torch.cat([part.rows for part in parts]).cpu()
        order = rows.argsort()
        logits = join("logits")
        assert logits is not None
        return cls(rows[order], logits, join("labels"), join("groups"))


def metric_direction(metric: str) -> Literal["maximize", "minimize"]:
    """`maximize` or `minimize`, as Optuna names them."""
    return "minimize" if metric in LOWER_IS_BETTER else "maximize"


def check_metric(task: Task, metric: str | None, grouped: bool = True) -> str:
    """The metric to monitor: the task's first if it is None.

    Raises:
        ConfigError: the task has no such metric, or it needs groups where there are none.
    """
    if metric is None:
        return METRICS[task][0]
    if metric not in METRICS[task]:
        raise ConfigError(f"monitor.metric: a {task} task has {', '.join(METRICS[task])}; got {metric}")
    if metric in ("map", "mrr") and not grouped:
        raise ConfigError(f"monitor.metric: {metric} ranks the rows of each group; name data.group_column")
    return metric


def scores(task: Task, logits: Tensor) -> Tensor:
    """Logits [N, outputs] as scores.

    Probability of yes, [N] (binary), of each class, [N, C] (multi-class), of each label, [N, L] (multi-label);
    the value itself, [N] (regression).
    """
    logits = logits.float()
    if task == "binary":
        return logits.squeeze(-1).sigmoid()
    if task == "multiclass":
        return logits.softmax(dim=-1)
    if task == "multilabel":
        return logits.sigmoid()
    return logits.squeeze(-1)


def compute_metrics(schema: Schema, predictions: Predictions, per_class: bool = False) -> dict[str, float]:
    """All metrics of the task. Multi-class and multi-label figures are macro averages over the classes.

    Ranking metrics (auroc, average_precision) are left out where only one class is present, and `map` and `mrr` where
    there are no groups; groups without a yes are left out, as TREC's evaluation does. Where a logit is not finite,
    every metric is NaN: a model that has diverged must not count as one that answers no.

    Args:
        schema: task, label names and threshold.
        predictions: with labels.
        per_class: adds `f1/<label>`, `precision/<label>`, `recall/<label>` (multi-class and multi-label).
    """
    assert predictions.labels is not None
    if not predictions.logits.isfinite().all():
        return dict.fromkeys(METRICS[schema.task], float("nan"))
    score = scores(schema.task, predictions.logits)
    labels = predictions.labels
    if schema.task == "regression":
        found = _regression(score, labels)
    elif schema.task == "binary":
        found = _binary(score, labels.long(), schema.threshold, predictions.groups)
    else:
        found = _several_classes(schema, score, labels.long(), per_class)
    return {name: float(value) for name, value in found.items()}


def _regression(score: Tensor, labels: Tensor) -> dict[str, Tensor]:
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
    yes = (score >= threshold).long()  # torchmetrics' own threshold is exclusive
    found: dict[str, Any] = {
        "f1": M.f1_score(yes, labels, task="binary"),
        "accuracy": M.accuracy(yes, labels, task="binary"),
        "precision": M.precision(yes, labels, task="binary"),
        "recall": M.recall(yes, labels, task="binary"),
    }
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
        accuracy = M.accuracy(decided, labels, average="micro", **task)
        present = len(labels.unique()) == classes
    else:
        task = {"task": "multilabel", "num_labels": classes}
        decided = (score >= schema.threshold).long()
        accuracy = M.accuracy(decided, labels, average="macro", **task)
        present = bool(((labels.sum(0) > 0) & (labels.sum(0) < len(labels))).all())
    found: dict[str, Any] = {"accuracy": accuracy}
    for name, function in (("f1", M.f1_score), ("precision", M.precision), ("recall", M.recall)):
        each = function(decided, labels, average="none", **task)
        found[name] = each.mean()
        if per_class:
            found |= {f"{name}/{label}": value for label, value in zip(schema.labels, each, strict=True)}
    if present:
        found["auroc"] = M.auroc(score, labels, average="macro", **task)
        found["average_precision"] = M.average_precision(score, labels, average="macro", **task)
    return found


def best_threshold(score: np.ndarray, labels: np.ndarray, metric: str = "f1") -> float:
    """The threshold at which `metric` is highest, half way between two neighbouring scores.

    Of equally good ones it is the highest, and it is above all scores where a no for every row is best.

    Args:
        score: [N] or [N, L] probabilities; several labels are taken together.
        labels: 0 or 1, of the same shape.
        metric: `accuracy`, or anything else for F1, the usual measure of a yes/no decision.
    """
    order = np.argsort(-score.ravel(), kind="stable")
    ranked, truth = score.ravel()[order], labels.ravel()[order] > 0.5
    one = ranked.dtype.type(1)
    edges = np.concatenate(([np.nextafter(one, 2 * one)], ranked, [0 * one]))
    count = np.arange(len(ranked) + 1)  # of rows that get a yes; the cut lies between edges[count] and the next one
    hits = np.append(0, np.cumsum(truth))
    quality = 2 * hits - count if metric == "accuracy" else 2 * hits / np.maximum(count + truth.sum(), 1)
    possible = np.append(edges[:-2] > edges[1:-1], True)  # rows of one score go together
    best = int(np.argmax(np.where(possible, quality, -np.inf)))
    middle = (edges[best] + edges[best + 1]) / 2
    return float(middle if middle > edges[best + 1] else edges[best])  # neighbouring floats have no middle
