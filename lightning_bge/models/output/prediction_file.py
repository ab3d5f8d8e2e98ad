"""Predictions as a CSV file."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_bge.models.metrics.predictions import Predictions, scores
from lightning_bge.runtime.run_folder import write_text
from lightning_bge.types import Schema


def write_predictions(
    path: Path, schema: Schema, predictions: Predictions, extra: Mapping[str, Sequence[Any]] | None = None
) -> None:
    """Write one line a row of the file that was read, in its order; no text is written.

    Columns: `row` (from 0), then `score` (binary: the probability of yes; regression: the value) or `score:<label>` for
    each label, then `label` (not for a regression), `truth` where labels are known, and the extra ones.

    Args:
        path: where to; the file appears whole or not at all.
        schema: task, label names and threshold.
        predictions: sorted by row.
        extra: more columns, in the predictions' order.
    """
    columns = {**prediction_columns(schema, predictions), **(extra or {})}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_text(path, text.getvalue())


def prediction_columns(schema: Schema, predictions: Predictions) -> dict[str, Sequence[Any]]:
    """The columns of `write_predictions` by their names, without the extra ones."""
    score = scores(schema.task, predictions.logits)
    columns: dict[str, Sequence[Any]] = {"row": predictions.rows.tolist()}
    if score.ndim == 1:
        columns["score"] = [f"{value:.6f}" for value in score.tolist()]
    else:
        for number, label in enumerate(schema.labels):
            columns[f"score:{label}"] = [f"{value:.6f}" for value in score[:, number].tolist()]
    if schema.task != "regression":
        columns["label"] = decide(schema, score)
    if predictions.labels is not None:
        columns["truth"] = _names(schema, predictions.labels)
    return columns


def decide(schema: Schema, score: Tensor) -> list[str]:
    """Label names for scores: at the threshold (binary, multi-label, several joined by `|`), or the highest one."""
    if schema.task == "multiclass":
        return _names(schema, score.argmax(dim=-1))
    return _names(schema, (score >= schema.threshold).float())


def _names(schema: Schema, labels: Tensor) -> list[str]:
    if schema.task == "regression":
        return [f"{value:g}" for value in labels.tolist()]
    if schema.task == "multilabel":
        return [
            "|".join(name for name, on in zip(schema.labels, row, strict=True) if on) for row in labels.bool().tolist()
        ]
    return [schema.labels[int(number)] for number in labels.tolist()]
