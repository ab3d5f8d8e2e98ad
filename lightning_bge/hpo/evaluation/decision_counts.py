"""Yes/no decisions on many resamples of the rows at once: counts at candidate thresholds, and the metrics of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_bge.hpo.evaluation.resampling import sum_by
from lightning_bge.models.metrics.decisions import metric_of_counts
from lightning_bge.models.metrics.names import threshold_metric
from lightning_bge.models.metrics.threshold import THRESHOLD_PARTS
from lightning_bge.types import Task

MAX_THRESHOLDS = 256  # candidates, at quantiles of the scores of positive rows: finer ones change F1 by less than 0.4 %
MIN_THRESHOLDS = 32  # the same where there are 32 labels or more


@dataclass(frozen=True)
class Decider:
    """Turns logits into decisions at each of K thresholds, for C classes.

    Attributes:
        task: binary, multilabel or multiclass.
        thresholds: float [K], descending, of logits; a class of a multi-class task is decided by the highest logit.
        tuned: whether one of the thresholds is chosen; else there is one alone.
    """

    task: Task
    thresholds: np.ndarray
    tuned: bool

    @classmethod
    def fixed(cls, task: Task) -> Decider:
        """The threshold 0.5, or the highest class."""
        return cls(task, np.zeros(1), tuned=False)

    @classmethod
    def candidates(cls, task: Task, logits: np.ndarray, labels: np.ndarray) -> Decider:
        """Thresholds to choose from: a no for every row, and what positive rows have.

        Args:
            task: binary or multilabel.
            logits: float [N, outputs].
            labels: encoded, of as many rows and outputs.
        """
        positive = np.unique(logits.ravel()[labels.ravel() > 0.5])
        # the mean over many labels changes little between two thresholds
        count = max(MIN_THRESHOLDS, MAX_THRESHOLDS * 4 // max(4, logits.shape[1]))
        if len(positive) > count:
            positive = np.unique(np.quantile(positive, np.linspace(0, 1, count), method="lower"))
        return cls(task, np.concatenate(([np.inf], positive[::-1])), tuned=True)

    def columns(self, logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each class the first threshold at which a row gets a yes (K: none), int [N, C], and its truth, [N, C]."""
        if self.task == "multiclass":
            classes = np.arange(logits.shape[1])
            return (logits.argmax(1)[:, None] != classes).astype(np.int64), labels[:, None] == classes
        place = np.searchsorted(-self.thresholds, -logits, side="left")
        return place, labels.reshape(len(labels), -1) > 0.5


@dataclass(frozen=True)
class Counts:
    """Counts of weighted rows, for C classes, at K thresholds, on B resamples.

    Attributes:
        hits: float [C, K, B], positive rows that get a yes.
        yes: float [C, K, B], rows that get a yes.
        positive: float [C, 1, B].
        rows: float [B].
    """

    hits: np.ndarray
    yes: np.ndarray
    positive: np.ndarray
    rows: np.ndarray

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(mine - theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def at(self, chosen: np.ndarray) -> Counts:
        """The counts at one threshold for each resample, int [B]."""
        place = np.broadcast_to(chosen, (len(self.hits), 1, len(chosen)))
        hits, yes = (np.take_along_axis(each, place, axis=1) for each in (self.hits, self.yes))
        return Counts(hits, yes, self.positive, self.rows)

    def of(self, chosen: np.ndarray) -> Counts:
        """The counts of some of the resamples: bool [B] -> the others are 0."""
        return Counts(*(each * chosen for each in vars(self).values()))

    def metric(self, name: str, task: Task) -> np.ndarray:
        """One of `DECISION_METRICS` at each threshold, [K, B]; NaN without a row."""
        return metric_of_counts(name, task, **vars(self))

    def best(self, name: str, task: Task) -> np.ndarray:
        """The threshold of each resample that `best_threshold` would choose for a metric, int [B]."""
        found: np.ndarray = np.nan_to_num(self.metric(threshold_metric(name), task)).argmax(0)
        return found


def count_decisions(
    decider: Decider, logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, parts: np.ndarray | None = None
) -> list[Counts]:
    """Count at all thresholds.

    Args:
        decider: thresholds.
        logits: float [N, outputs].
        labels: encoded, [N] or [N, L].
        weights: float32 [N, B], how often each row is in each resample.
        parts: int [N], the part that each row is in, for a count of each; None: one count of all.
    """
    count = 1 if parts is None else THRESHOLD_PARTS
    part = np.zeros(len(logits), dtype=np.int64) if parts is None else parts
    places, truth = decider.columns(logits, labels)
    size = len(decider.thresholds) + 1  # the last place is that of a no at every threshold
    each = []
    for column in range(places.shape[1]):
        key = (part * 2 + truth[:, column]) * size + places[:, column]
        each.append(sum_by(key, count * 2 * size, weights).reshape(count, 2, size, -1))
    found = np.stack(each, axis=1)  # [parts, C, no or yes, K + 1, B]
    hits = found[:, :, 1, :-1].cumsum(2)
    yes = hits + found[:, :, 0, :-1].cumsum(2)
    positive, rows = found[:, :, 1].sum(2, keepdims=True), found[:, 0].sum((1, 2))
    return [Counts(hits[number], yes[number], positive[number], rows[number]) for number in range(count)]


def sum_of(counts: Sequence[Counts]) -> Counts:
    """The counts of several sets of rows together."""
    return sum(counts[1:], counts[0])


def cross_fitted(parts: Sequence[Counts], name: str, task: Task) -> np.ndarray:
    """The metric with each part decided at the threshold that is best on the other parts, [B]."""
    total = sum_of(parts)
    found: np.ndarray = sum_of([part.at((total - part).best(name, task)) for part in parts]).metric(name, task)[0]
    return found
