"""Models that are no better than the same answer for every row."""

import math
from dataclasses import replace

from lightning_bge.models.metrics.compute import compute_metrics
from lightning_bge.models.metrics.config import MonitorConfig
from lightning_bge.models.metrics.predictions import Predictions, constant_logits, scores
from lightning_bge.types import Schema

EQUAL = 1e-6  # scores that differ by less are the same: files have six digits


def warn_of_constants(
    schema: Schema, predictions: Predictions, monitor: MonitorConfig, value: float, baseline: float
) -> list[str]:
    """Sentences, without a full stop, on a model that is no better than the same answer for every row.

    Args:
        schema: of the model.
        predictions: of validation rows.
        monitor: the metric.
        value: its value for the model.
        baseline: its best value for constant predictions (`majority_baseline`); NaN where it has none.
    """
    found = []
    if value <= baseline if monitor.direction == "maximize" else value >= baseline:
        same = "the mean of the labels" if schema.task == "regression" else "the same answer"
        found.append(
            f"no better than {same} for every row: {monitor.name} {value:.4f}, and {baseline:.4f} for that. Train "
            "longer, search for other hyperparameters, look at the labels, or monitor another metric"
        )
    score = scores(schema.task, predictions.logits)
    if len(score) > 1 and bool((score.amax(dim=0) - score.amin(dim=0) < EQUAL).all()):
        found.append("every row has the same score: the model tells nothing apart. Train longer, or look at the texts")
    return found


def majority_baseline(schema: Schema, predictions: Predictions, monitor: MonitorConfig) -> float:
    """The best value of the metric among constant predictions: one class (or yes, or no) for all rows, or the mean."""
    assert predictions.labels is not None
    shape = predictions.logits.shape
    answers = constant_logits(schema.task, shape[1], float(predictions.labels.float().mean()))
    constant = (replace(predictions, logits=one.expand(shape)) for one in answers)
    metrics = [compute_metrics(schema, one, monitored=monitor.metric) for one in constant]
    values = (one.get(monitor.name, math.nan) for one in metrics)
    found = [value for value in values if not math.isnan(value)]
    best = max if monitor.direction == "maximize" else min
    return best(found, default=float("nan"))
