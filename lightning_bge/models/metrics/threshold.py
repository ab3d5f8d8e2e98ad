"""Thresholds of yes/no decisions, and metrics at thresholds that were tuned on other rows."""

from __future__ import annotations

import numpy as np
import torch

from lightning_bge.models.metrics.compute import decision_metrics, further_decision_metric
from lightning_bge.models.metrics.decisions import metric_of_counts
from lightning_bge.models.metrics.names import (
    AGREEMENT,
    BETA,
    DECISION_METRICS,
    USUAL_DECISIONS,
    Metric,
    threshold_metric,
)
from lightning_bge.models.metrics.predictions import Predictions, scores
from lightning_bge.types import Schema

THRESHOLD_PARTS = 5  # of the validation rows: each is decided at the threshold that is best on the others


def tuned_metrics(
    schema: Schema, predictions: Predictions, others: Predictions | None = None, monitored: Metric | None = None
) -> dict[str, float]:
    """Metrics of yes/no decisions at a threshold that was tuned on other rows: the usual ones, and the monitored one.

    Where there are `others`, the threshold is the one that is best on them (`threshold_metric`). That also shows
    whether a threshold suits another model, as the exported model is not the one that its threshold is tuned on. Else
    the rows are cut into `THRESHOLD_PARTS` parts (`threshold_parts`), and each part is decided at the threshold that is
    best on the other parts.

    Args:
        schema: of a binary or multi-label task.
        predictions: with labels.
        others: other rows, with labels, as other models of the same hyperparameters have predicted them.
        monitored: the monitored metric; it is added where it is one of decisions.

    Returns:
        The metrics by their names; NaN where a logit is not finite.
    """
    assert predictions.labels is not None
    further = [monitored] if isinstance(monitored, str) and monitored in DECISION_METRICS else []
    names = dict.fromkeys([*USUAL_DECISIONS, *further])
    if not predictions.logits.isfinite().all():
        return dict.fromkeys(names, float("nan"))
    score, labels = scores(schema.task, predictions.logits).numpy(), predictions.labels.numpy()
    parts = threshold_parts(len(labels), None if predictions.groups is None else predictions.groups.numpy())
    found: dict[str, float] = {}
    for best in dict.fromkeys(map(threshold_metric, names)):
        if others is None:
            decided = torch.from_numpy(cross_fitted_decisions(score, labels, parts, best))
        else:
            assert others.labels is not None
            known = scores(schema.task, others.logits).numpy()
            decided = torch.from_numpy(score >= best_threshold(known, others.labels.numpy(), best)).long()
        at = decision_metrics(schema.task, decided, predictions.labels.long(), schema.labels)
        for name in names:
            if threshold_metric(name) == best:
                truth = predictions.labels.long()
                found[name] = float(at[name]) if name in at else further_decision_metric(name, schema, decided, truth)
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
        metric: `accuracy`, `f0.5`, `f2`, `mcc` or `kappa` (binary), or anything else for F1, the usual measure of a
            yes/no decision; with several labels the mean of their F1 (F0.5, F2), as `compute_metrics` has it.
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
    if metric in AGREEMENT:  # of a binary task
        hits, yes = np.append(0, np.cumsum(hit)), np.arange(len(hit) + 1)
        counts = {"hits": hits[None], "yes": yes[None], "positive": hits[-1:, None], "rows": yes[-1]}
        quality = np.nan_to_num(metric_of_counts(metric, "binary", **counts))
    elif metric == "accuracy":
        quality[1:] = 2 * np.cumsum(hit) - np.arange(1, len(hit) + 1)
    else:  # each label's F1 changes at its own entries alone
        square = BETA.get(metric, 1.0) ** 2
        own = np.argsort(column, kind="stable").reshape(truth.shape[1], -1)
        hits, count = np.cumsum(hit[own], axis=1), np.arange(1, len(truth) + 1)
        each = (1 + square) * hits / (count + square * truth.sum(axis=0)[:, None])
        if len(own) == 1:  # no sum, so that equal values stay equal
            quality[1:] = each[0]
        else:
            quality[1:][own] = np.diff(each, axis=1, prepend=0)
            quality = np.cumsum(quality)
    possible = np.append(edges[:-2] > edges[1:-1], True)  # rows of one score go together
    best = int(np.argmax(np.where(possible, quality, -np.inf)))
    middle = (edges[best] + edges[best + 1]) / 2
    return float(middle if middle > edges[best + 1] else edges[best])  # neighbouring floats have no middle
