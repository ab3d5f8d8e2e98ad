"""Labels on which a metric can't be computed are refused, and only those."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_bge.errors import DataError
from lightning_bge.models.metrics.computable import check_computable
from lightning_bge.models.metrics.compute import compute_metrics
from lightning_bge.models.metrics.names import METRICS, Metric, metric_name
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.types import Schema

BINARY = Schema("binary", ("no", "yes"), ("text",), 8)
CLASSES = Schema("multiclass", ("a", "b", "c"), ("text",), 8)
LABELS = Schema("multilabel", ("x", "y"), ("text",), 8)
NUMBER = Schema("regression", (), ("text",), 8)
NO, YES, BOTH = np.zeros(4, np.float32), np.ones(4, np.float32), np.array([0, 1, 0, 1], np.float32)
GROUPS = np.array([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("schema", "metric", "labels", "groups", "expected"),
    [
        (BINARY, "auroc", NO, None, r"as no row is of the class 'yes'\. Add such rows.*such as accuracy"),
        (BINARY, "average_precision", YES, None, "no row is of the class 'no'"),
        (BINARY, "f1", NO, None, "no row is of the class 'yes'"),
        (BINARY, "map", BOTH, None, r"they have no groups \(data\.group_column\)"),
        (BINARY, "mrr", NO, GROUPS, "no group has a row of the class 'yes'"),
        (BINARY, "map", YES, GROUPS, "no row is of the class 'no'"),
        (CLASSES, "auroc", np.array([0, 0, 2]), None, "no row is of the class 'b'"),
        (CLASSES, "average_precision", np.array([1]), None, "no row is of the class 'a', none of the class 'c'"),
        (LABELS, "auroc", np.array([[1, 0], [1, 0]]), None, "no row is with the label 'y', none without the label 'x'"),
        (LABELS, "f1", np.zeros((3, 2)), None, "no row has a label"),
        (BINARY, "mcc", NO, None, "no row is of the class 'yes'"),
        (BINARY, "recall_at_precision_80", YES, None, "no row is of the class 'no'"),
        (BINARY, "f2", NO, None, "no row is of the class 'yes'"),
        (CLASSES, "kappa", np.array([1, 1]), None, "all are of one class"),
        (BINARY, {"class_path": "torchmetrics.AUROC"}, NO, None, "No positive samples in targets"),
        (NUMBER, {"class_path": "torchmetrics.R2Score"}, np.array([1.0]), None, "at least two samples"),
        (NUMBER, "spearman", np.full(3, 2.5), None, r"all labels are 2\.5.*such as mse"),
        (NUMBER, "r2", np.array([1.0]), None, "all labels are 1"),
        (BINARY, "f1", np.zeros(0), None, "there are no rows"),
    ],
)
def test_refused(schema: Schema, metric: Metric, labels: np.ndarray, groups: np.ndarray | None, expected: str) -> None:
    with pytest.raises(DataError, match=f"^fold 1 of x.csv: .*metric {metric_name(metric)} .*{expected}|no rows"):
        check_computable(schema, metric, labels, groups, "fold 1 of x.csv")


@pytest.mark.parametrize(
    ("schema", "labels"),
    [
        *((BINARY, labels) for labels in (NO, YES, BOTH)),
        *((CLASSES, np.array(labels)) for labels in ([0, 0], [0, 1], [0, 1, 2, 0])),
        *((LABELS, np.array(labels, np.float32)) for labels in ([[0, 0], [0, 1]], [[1, 0], [0, 1]], [[1, 1], [0, 1]])),
        *((NUMBER, np.array(labels, np.float32)) for labels in ([1.0], [1.0, 1.0], [1.0, 2.0])),
    ],
)
@pytest.mark.parametrize("grouped", [False, True])
def test_what_is_accepted_is_computed(schema: Schema, labels: np.ndarray, grouped: bool) -> None:
    groups = np.arange(len(labels)) // 2 if grouped else None
    logits = torch.randn(len(labels), schema.num_outputs, generator=torch.Generator().manual_seed(0))
    numbers = None if groups is None else torch.from_numpy(groups)
    predictions = Predictions(torch.arange(len(labels)), logits, torch.from_numpy(labels), numbers)
    for metric in METRICS[schema.task]:
        found = compute_metrics(schema, predictions, monitored=metric)
        try:
            check_computable(schema, metric, labels, groups, "x.csv")
        except DataError:
            # not there, or the same for every model
            assert metric not in found or found[metric] in (0.0, float("-inf")) or np.isnan(found[metric])
        else:
            assert metric == "loss" or np.isfinite(found[metric])


def test_many_missing_classes_are_not_all_listed() -> None:
    schema = Schema("multiclass", tuple("abcdefghij"), ("text",), 8)
    with pytest.raises(DataError, match="none of the class 'f' and 4 more"):
        check_computable(schema, "auroc", np.array([0]), None, "x.csv")
