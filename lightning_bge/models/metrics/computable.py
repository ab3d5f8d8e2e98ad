"""Whether a metric can be computed on some labels, known before anything is trained."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch

from lightning_bge.errors import ConfigError, DataError
from lightning_bge.models.metrics.class_path import compute_class, made_up_scores
from lightning_bge.models.metrics.names import AGREEMENT, Metric, fixed_precision, metric_name
from lightning_bge.types import Schema

RANKING = ("auroc", "average_precision")  # they need every class
BY_GROUP = ("map", "mrr")
CORRELATIONS = ("spearman", "pearson", "r2")
# 0 for every model where no row is a yes
OF_YES = ("f1", "precision", "recall", "f0.5", "f2", "f1_micro", "f1_weighted")
MAX_NAMES = 5  # that a message lists


def check_computable(schema: Schema, metric: Metric, labels: np.ndarray, groups: np.ndarray | None, where: str) -> None:
    """Refuse labels on which the monitored metric is not defined, or is the same for every model.

    It looks at labels and groups alone: call it for each fold, file or other set of rows that the metric is monitored
    on, before the first step.

    Args:
        schema: task and label names.
        metric: the monitored one, as `check_monitor` returns it; a class is tried on these labels.
        labels: encoded, [N], or [N, L] with several labels.
        groups: int [N], a number for each group, or None.
        where: the file or the split, such as `fold 2 of train.csv`; the message begins with it.

    Raises:
        DataError: names the rows, the metric and the remedy.
    """
    name = metric_name(metric)
    if len(labels) == 0:
        raise DataError(f"{where}: there are no rows to compute the metric {name} on: name a file or split with rows")
    if isinstance(metric, dict):
        lacking = _lacking_for_class(schema, metric, labels, groups)
    elif schema.task == "regression":
        lacking = _lacking_numbers(metric, labels)
    elif metric in BY_GROUP:
        lacking = _lacking_groups(schema, labels, groups)
    else:
        lacking = _lacking_classes(schema, metric, labels)
    if lacking:
        other = "mse" if schema.task == "regression" else "loss" if metric == "accuracy" else "accuracy"
        raise DataError(
            f"{where}: the metric {name} can't be computed on these {len(labels)} rows, as {lacking}. Add such rows, "
            f"or set monitor.metric to one that needs none, such as {other}"
        )


def _lacking_numbers(metric: str, labels: np.ndarray) -> str | None:
    if metric in CORRELATIONS and labels.min() == labels.max():
        return f"all labels are {labels[0]:g}: it compares rows of different labels"
    return None


def _lacking_groups(schema: Schema, labels: np.ndarray, groups: np.ndarray | None) -> str | None:
    yes = labels > 0.5
    if groups is None:
        return "they have no groups (data.group_column)"
    if not yes.any():
        return f"no group has a row of the class {schema.labels[1]!r}"
    return f"no row is of the class {schema.labels[0]!r}" if yes.all() else None


def _lacking_classes(schema: Schema, metric: str, labels: np.ndarray) -> str | None:
    """Which rows the metric lacks, as a sentence; None: it has what it needs."""
    ranks = metric in RANKING or fixed_precision(metric) is not None
    if schema.task == "multiclass":
        counts = np.bincount(labels.astype(np.int64), minlength=len(schema.labels))
        missing = [f"of the class {name!r}" for name, count in zip(schema.labels, counts, strict=True) if not count]
        if metric in AGREEMENT and counts.max() == len(labels):
            return "all are of one class"
        return _none_is(missing) if ranks else None
    yes = labels.reshape(len(labels), -1) > 0.5
    if metric in OF_YES and not yes.any():
        return _none_is([f"of the class {schema.labels[1]!r}"]) if schema.task == "binary" else "no row has a label"
    if not (ranks or metric in AGREEMENT):
        return None
    if schema.task == "binary":
        names = [schema.labels[value] for value, there in ((0, not yes.all()), (1, yes.any())) if not there]
        return _none_is([f"of the class {name!r}" for name in names])
    counts = yes.sum(axis=0)
    without = [f"with the label {schema.labels[place]!r}" for place in np.flatnonzero(counts == 0)]
    every = [f"without the label {schema.labels[place]!r}" for place in np.flatnonzero(counts == len(labels))]
    return _none_is([*without, *every])


def _lacking_for_class(
    schema: Schema, metric: dict[str, Any], labels: np.ndarray, groups: np.ndarray | None
) -> str | None:
    """What a metric of torchmetrics says of these labels with made-up scores; None: it gives a number."""
    score, truth = made_up_scores(schema, len(labels)), torch.from_numpy(labels)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value = compute_class(metric, schema, score, truth, None if groups is None else torch.from_numpy(groups))
        except ConfigError as error:
            return str(error).partition(": ")[2]
    said = [str(one.message) for one in caught if "samples in targets" in str(one.message)]
    return said[0].partition(",")[0] if said else None if math.isfinite(value) else f"it is {value} there"


def _none_is(what: list[str]) -> str | None:
    more = f" and {len(what) - MAX_NAMES} more" if len(what) > MAX_NAMES else ""
    return f"no row is {', none '.join(what[:MAX_NAMES])}{more}" if what else None
