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
DECISION_METRICS = ("f1", "accuracy", "precision", "recall")  # what the threshold of a yes/no decision changes
HAS_THRESHOLD = ("binary", "multilabel")  # tasks
THRESHOLD_PARTS = 5  # of the validation rows: each is decided at the threshold that is best on the others


@dataclass(frozen=True)
class MonitorConfig:
    """The metric of a run, and which epoch's value is its score.

    Attributes:
        metric: metric for early stopping, checkpoints and the study; null: f1, or spearman for a regression.
        objective: the score of a run is the value of its `best` or of its `last` epoch.
        patience: stop after this many epochs without a better value; null: never stop early.
        threshold: where f1, accuracy, precision or recall of yes/no decisions (binary, multi-label) are compared:
            `tuned` takes the threshold that is best on the folds before, and in a first or only fold the one that is
            best on other parts of its rows, as the exported model has a tuned threshold too; `fixed` takes 0.5, which
            also ranks how well scores are calibrated.
    """

    metric: str | None = None
    objective: Literal["best", "last"] = "best"
    patience: int | None = None
    threshold: Literal["tuned", "fixed"] = "tuned"

    def __post_init__(self) -> None:
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"monitor.patience: expected 1 or more, or null, got {self.patience}")
        if self.threshold not in ("tuned", "fixed"):
            raise ConfigError(f"monitor.threshold: expected tuned or fixed, got {self.threshold!r}")

    @property
    def tuned(self) -> bool:
        """Whether values are compared at a tuned threshold."""
        return self.threshold == "tuned" and self.metric in DECISION_METRICS

    @property
    def logged(self) -> str:
        """The name under which a module logs the monitored value of a validation."""
        return f"val_{'tuned_' if self.tuned else ''}{self.metric}"


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


def check_metric(
    task: Task, metric: str | None, threshold: Literal["tuned", "fixed"] = "tuned", grouped: bool = True
) -> tuple[str, Literal["tuned", "fixed"]]:
    """The metric to monitor, and at which threshold.

    Args:
        task: of the model.
        metric: the requested one; None: the task's first.
        threshold: the requested one; `fixed` is returned where the task or the metric has none.
        grouped: whether rows have groups.

    Raises:
        ConfigError: the task has no such metric, or it needs groups where there are none.
    """
    metric = METRICS[task][0] if metric is None else metric
    if metric not in METRICS[task]:
        raise ConfigError(f"monitor.metric: a {task} task has {', '.join(METRICS[task])}; got {metric}")
    if metric in ("map", "mrr") and not grouped:
        raise ConfigError(f"monitor.metric: {metric} ranks the rows of each group; name data.group_column")
    return metric, threshold if task in HAS_THRESHOLD and metric in DECISION_METRICS else "fixed"


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


def constant_logits(task: Task, outputs: int, mean: float) -> Tensor:
    """The constant predictions: no and yes, each class, or (regression) the mean of the labels; [K, outputs]."""
    if task == "regression":
        return torch.full((1, outputs), mean)
    if task == "multiclass":
        return torch.eye(outputs) * 20
    return torch.tensor([[-20.0], [20.0]]).expand(2, outputs)


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
    found = _decision_metrics("binary", (score >= threshold).long(), labels)  # torchmetrics' threshold is exclusive
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
    found = _decision_metrics(schema.task, decided, labels, schema.labels, per_class)
    if present:
        found["auroc"] = M.auroc(score, labels, average="macro", **task)
        found["average_precision"] = M.average_precision(score, labels, average="macro", **task)
    return found


def _decision_metrics(
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


def tuned_metrics(schema: Schema, predictions: Predictions, others: Predictions | None = None) -> dict[str, float]:
    """F1, accuracy, precision and recall of yes/no decisions at a threshold that was tuned on other rows.

    Where there are `others`, the threshold is the one that is best on them: for accuracy the one with the best
    accuracy, for the rest the one with the best F1. That also shows whether a threshold suits another model, as the
    exported model is not the one that its threshold is tuned on. Else the rows are cut into `THRESHOLD_PARTS` parts
    (`threshold_parts`), and each part is decided at the threshold that is best on the other parts.

    Args:
        schema: of a binary or multi-label task.
        predictions: with labels.
        others: other rows, with labels, as other models of the same hyperparameters have predicted them.

    Returns:
        The metrics by their names; NaN where a logit is not finite.
    """
    assert predictions.labels is not None
    if not predictions.logits.isfinite().all():
        return dict.fromkeys(DECISION_METRICS, float("nan"))
    score, labels = scores(schema.task, predictions.logits).numpy(), predictions.labels.numpy()
    parts = threshold_parts(len(labels), None if predictions.groups is None else predictions.groups.numpy())
    found: dict[str, float] = {}
    for metrics in (("accuracy",), ("f1", "precision", "recall")):
        if others is None:
            decided = torch.from_numpy(cross_fitted_decisions(score, labels, parts, metrics[0]))
        else:
            assert others.labels is not None
            known = scores(schema.task, others.logits).numpy()
            decided = torch.from_numpy(score >= best_threshold(known, others.labels.numpy(), metrics[0])).long()
        at = _decision_metrics(schema.task, decided, predictions.labels.long(), schema.labels)
        found |= {name: float(at[name]) for name in metrics}
    return found


def threshold_parts(count: int, groups: np.ndarray | None = None) -> np.ndarray:
    """The part, 0 ... `THRESHOLD_PARTS` - 1, that each of so many rows is in, int64 [N]; a group is in one part.

    The parts are drawn at random, always the same ones for as many rows or groups.
    """
    units = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]
    order = np.random.default_rng(0).permutation(int(units.max()) + 1)
    found: np.ndarray = order[units] % THRESHOLD_PARTS
    return found


def cross_fitted_decisions(score: np.ndarray, labels: np.ndarray, parts: np.ndarray, metric: str = "f1") -> np.ndarray:
    """Yes (1) or no (0) for every row, each part's at the threshold that is best on the *other* parts.

    So the threshold is evaluated on rows that it was not chosen on.

    Args:
        score: [N] or [N, L] probabilities.
        labels: 0 or 1, of the same shape.
        parts: int [N], the part of each row. A single part is decided at the threshold that is best on itself.
        metric: see `best_threshold`.
    """
    decided = np.zeros(score.shape, dtype=np.int64)
    for part in np.unique(parts):
        mine = parts == part
        others = mine if mine.all() else ~mine
        decided[mine] = score[mine] >= best_threshold(score[others], labels[others], metric)
    return decided


def best_threshold(score: np.ndarray, labels: np.ndarray, metric: str = "f1") -> float:
    """The threshold at which `metric` is highest, half way between two neighbouring scores.

    Of equally good ones it is the highest, and it is above all scores where a no for every row is best.

    Args:
        score: [N] or [N, L] probabilities; several labels have one threshold.
        labels: 0 or 1, of the same shape.
        metric: `accuracy`, or anything else for F1, the usual measure of a yes/no decision; with several labels the
            mean of their F1, as `compute_metrics` has it.
    """
    order = np.argsort(-score.ravel(), kind="stable")
    ranked = score.ravel()[order]
    one = ranked.dtype.type(1)
    edges = np.concatenate(([np.nextafter(one, 2 * one)], ranked, [0 * one]))
    # of the first 0, 1, ... entries that get a yes; the cut lies between edges[count] and the next one
    truth = (labels.reshape(len(labels), -1) > 0.5).astype(np.float64)
    column = np.broadcast_to(np.arange(truth.shape[1]), truth.shape).ravel()[order]
    hit = truth.ravel()[order]
    quality = np.zeros(len(ranked) + 1)
    if metric == "accuracy":
        quality[1:] = 2 * np.cumsum(hit) - np.arange(1, len(hit) + 1)
    else:  # each label's F1 changes at its own entries alone
        own = np.argsort(column, kind="stable").reshape(truth.shape[1], -1)
        hits, count = np.cumsum(hit[own], axis=1), np.arange(1, len(truth) + 1)
        each = 2 * hits / (count + truth.sum(axis=0)[:, None])
        if len(own) == 1:  # no sum, so that equal values stay equal
            quality[1:] = each[0]
        else:
            quality[1:][own] = np.diff(each, axis=1, prepend=0)
            quality = np.cumsum(quality)
    possible = np.append(edges[:-2] > edges[1:-1], True)  # rows of one score go together
    best = int(np.argmax(np.where(possible, quality, -np.inf)))
    middle = (edges[best] + edges[best + 1]) / 2
    return float(middle if middle > edges[best + 1] else edges[best])  # neighbouring floats have no middle
