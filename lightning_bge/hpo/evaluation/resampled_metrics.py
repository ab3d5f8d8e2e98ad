"""Ranking metrics, errors and correlations of a model's outputs on many resamples of the rows at once.

Each figure equals that of `lightning_bge.models.metrics` on the rows, each repeated as often as it was drawn.
"""

from collections.abc import Callable

import numpy as np
from scipy.special import expit, softmax

from lightning_bge.hpo.evaluation.resampling import mean_of_known, sum_by
from lightning_bge.models.metrics.names import fixed_precision
from lightning_bge.types import Task

Column = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # score [N], labels [N], weights [N, B] -> [B]


def resampled_metric(
    task: Task,
    metric: str,
    logits: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """A metric on B resamples of N rows, float64 [B]; NaN where a resample does not have what the metric needs.

    Args:
        task: binary, multiclass, multilabel or regression.
        metric: auroc, average_precision, recall_at_precision_<p>, map, mrr, spearman, pearson, mse, mae or r2. With
            several classes the mean over those that a resample has.
        logits: float [N, outputs].
        labels: encoded, [N] or [N, L].
        weights: float [N, B], how often each row is in each resample; equal within a group where there are groups.
        groups: int [N], for map and mrr.
    """
    if metric in ("map", "mrr"):
        assert groups is not None
        return _by_group(metric, logits.squeeze(-1), labels, weights, groups)
    if (percent := fixed_precision(metric)) is not None:
        return _recall_at_precision(logits.squeeze(-1), labels, weights, percent)
    if task in ("binary", "regression"):
        return COLUMNS[metric](logits.squeeze(-1), labels, weights)
    if task == "multiclass":
        score, truth = softmax(logits, axis=1), labels[:, None] == np.arange(logits.shape[1])
    else:
        score, truth = expit(logits), labels
    each = [COLUMNS[metric](score[:, column], truth[:, column], weights) for column in range(score.shape[1])]
    return mean_of_known(np.array(each))


def _places(score: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, int]:
    """For each row the first of the positive rows' scores, the highest first, that is not above its own."""
    scores = np.unique(-score[positive])
    return np.searchsorted(scores, -score, side="left"), len(scores)


def _auroc(score: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    positive = labels > 0.5
    place, count = _places(score, positive)
    tied = ~positive & np.isin(score, score[positive])
    at, ties, others = (sum_by(np.where(rows, place, count), count, weights) for rows in (positive, tied, ~positive))
    wrong = (at * (np.cumsum(others, axis=0) - ties / 2)).sum(0, dtype=np.float64)
    hits, total = at.sum(0, dtype=np.float64), weights.sum(0, dtype=np.float64)
    pairs = hits * (total - hits)
    return 1 - wrong / np.where(pairs > 0, pairs, np.nan)


def _average_precision(score: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    positive = labels > 0.5
    place, count = _places(score, positive)
    at = sum_by(np.where(positive, place, count), count, weights)
    precision = np.cumsum(at, axis=0) / np.maximum(np.cumsum(sum_by(place, count, weights), axis=0), 1)
    hits = at.sum(0, dtype=np.float64)
    both = (hits > 0) & (hits < weights.sum(0, dtype=np.float64))
    return (precision * at).sum(0, dtype=np.float64) / np.where(both, hits, np.nan)


def _recall_at_precision(score: np.ndarray, labels: np.ndarray, weights: np.ndarray, percent: int) -> np.ndarray:
    positive = labels > 0.5
    place, count = _places(score, positive)
    hits = np.cumsum(sum_by(np.where(positive, place, count), count, weights), axis=0, dtype=np.float64)
    yes = np.cumsum(sum_by(place, count, weights), axis=0, dtype=np.float64)
    total = weights[positive].sum(0, dtype=np.float64)
    both = (total > 0) & (total < weights.sum(0, dtype=np.float64))
    found: np.ndarray = np.where(100 * hits >= percent * yes, hits, 0).max(0, initial=0) / np.where(both, total, np.nan)
    return found


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = weights.sum(0, dtype=np.float64)
    found: np.ndarray = (weights * values).sum(0, dtype=np.float64) / np.where(total > 0, total, np.nan)
    return found


def _column(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64)[:, None] if values.ndim == 1 else values


def _pearson(score: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    x, y = _column(score), _column(labels)
    x, y = x - _mean(x, weights), y - _mean(y, weights)
    spread = _mean(x * x, weights) * _mean(y * y, weights)
    found = np.where(spread > 0, _mean(x * y, weights) / np.sqrt(np.where(spread > 0, spread, 1)), 0.0)
    return np.where(np.isnan(spread), np.nan, found)  # no row was drawn


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Each row's mean rank among the repeated rows, [N, B]."""
    distinct, place = np.unique(values, return_inverse=True)
    each = sum_by(place, len(distinct), weights.astype(np.float64))
    return (np.cumsum(each, axis=0) - each / 2)[place]


def _spearman(score: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _pearson(_ranks(score, weights), _ranks(labels, weights), weights)


def _r2(score: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    x, y = _column(score), _column(labels)
    total = _mean((y - _mean(y, weights)) ** 2, weights)
    return 1 - _mean((y - x) ** 2, weights) / np.where(total > 0, total, np.nan)


def _mse(score: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _mean((_column(score) - _column(labels)) ** 2, weights)


def _mae(score: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _mean(np.abs(_column(score) - _column(labels)), weights)


COLUMNS: dict[str, Column] = {
    "auroc": _auroc,
    "average_precision": _average_precision,
    "spearman": _spearman,
    "pearson": _pearson,
    "r2": _r2,
    "mse": _mse,
    "mae": _mae,
}


def _by_group(
    metric: str, score: np.ndarray, labels: np.ndarray, weights: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """Mean over the groups that have a positive row; a group that was drawn twice counts twice."""
    ties = np.random.default_rng(0).permutation(len(score))  # else a file's order would rank rows of equal scores
    order = np.lexsort((ties, -score, groups))
    _, starts, place = np.unique(groups[order], return_index=True, return_inverse=True)
    hit = (labels[order] > 0.5).astype(np.float64)
    rank = np.arange(len(order)) - starts[place] + 1
    hits = np.cumsum(hit)
    within = hits - np.concatenate(([0.0], hits))[starts][place]  # in the group, down to this row
    if metric == "map":
        total = np.add.reduceat(hit, starts)
        value = np.add.reduceat(hit * within / rank, starts) / np.maximum(total, 1)
    else:
        value = np.maximum.reduceat(hit / rank, starts)
    drawn = weights[order][starts] * (np.add.reduceat(hit, starts) > 0)[:, None]
    total = drawn.sum(0, dtype=np.float64)
    found: np.ndarray = (drawn * value[:, None]).sum(0) / np.where(total > 0, total, np.nan)
    return found
