"""Metrics of decisions from counts, of one set of rows or of many resamples at once."""

from __future__ import annotations

import numpy as np

from lightning_bge.models.metrics.names import AGREEMENT, BETA
from lightning_bge.types import Task


def metric_of_counts(
    name: str, task: Task, *, hits: np.ndarray, yes: np.ndarray, positive: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """A metric of decisions, float64 [...]; NaN where there are no rows.

    Args:
        name: one of `DECISION_METRICS`.
        task: binary (C is 1), multilabel or multiclass.
        hits: [C, ...], positive rows that get a yes; multi-class: rows of a class that are decided to be of it.
        yes: [C, ...], rows that get a yes.
        positive: [C, ...], rows whose truth is a yes; it is broadcast.
        rows: [...], all rows; it is broadcast.
    """
    known = np.where(rows > 0, rows, np.nan)
    if name == "accuracy":
        return hits.sum(0) / known if task == "multiclass" else (1 - (yes + positive - 2 * hits) / known).mean(0)
    if name in AGREEMENT:
        return _agreement(name, hits, yes, positive, known)
    if name == "f1_micro":
        return np.where(rows > 0, _ratio(2 * hits.sum(0), yes.sum(0) + positive.sum(0)), np.nan)
    if name in ("precision", "recall"):
        each = _ratio(hits, yes if name == "precision" else positive)
    else:
        square = BETA.get(name, 1.0) ** 2
        each = _ratio((1 + square) * hits, yes + square * positive)
    if name == "f1_weighted":
        return np.where(rows > 0, _ratio((each * positive).sum(0), positive.sum(0)), np.nan)
    return np.where(rows > 0, each.mean(0), np.nan)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """0 where the whole is 0, as scikit-learn has it."""
    found: np.ndarray = part / np.where(whole > 0, whole, 1)
    return found


def _agreement(name: str, hits: np.ndarray, yes: np.ndarray, positive: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Matthews' correlation coefficient, or Cohen's kappa, of all classes together."""
    # products of counts, whose differences may be small
    hits, yes, positive, rows = (each.astype(np.float64) for each in (hits, yes, positive, rows))
    if len(hits) == 1:  # the negative class as well
        hits = np.concatenate((hits, rows - yes - positive + hits))
        yes, positive = np.concatenate((yes, rows - yes)), np.concatenate((positive, rows - positive))
    right, expected = hits.sum(0) * rows, (yes * positive).sum(0)
    if name == "kappa":
        beyond = rows**2 - expected
        return (right - expected) / np.where(beyond > 0, beyond, np.nan)
    spread = (rows**2 - (yes**2).sum(0)) * (rows**2 - (positive**2).sum(0))
    return np.where(np.isnan(rows), np.nan, (right - expected) / np.sqrt(np.where(spread > 0, spread, 1)))
