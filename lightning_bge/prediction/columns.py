"""The columns of predictions: what the model says of each row, and what is carried over from the file."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from lightning_bge.data.pieces import Piece
from lightning_bge.models.metrics.predictions import Predictions, scores
from lightning_bge.models.output.prediction_file import decide
from lightning_bge.types import Schema

OWN = ("row", "file", "score", "label", "reason", "truth")  # and score:<label>
NO_SCORE = "the model gives no finite score"


class ResultColumns:
    """Names and values of the columns.

    `row` (from 0 in its file), `file` where there are several, `score` (binary: the probability of yes; regression: the
    value) or `score:<label>` for each label, `label` (not for a regression), `reason` (why a row has no score), then
    those that are carried over, with `input_` before a name that is one of these.

    Args:
        schema: task, label names and threshold.
        kept: the columns to carry over.
        several_files: whether rows come from more than one file.

    Attributes:
        names: of all columns, in their order.
    """

    def __init__(self, schema: Schema, kept: Sequence[str], several_files: bool) -> None:
        self._schema, self._several_files = schema, several_files
        single = schema.task in ("binary", "regression")
        self._scores = ["score"] if single else [f"score:{label}" for label in schema.labels]
        label = [] if schema.task == "regression" else ["label"]
        own = ["row", *(["file"] if several_files else []), *self._scores, *label, "reason"]
        self._kept: dict[str, str] = {}
        for name in kept:
            new = name
            while new in OWN or new in own or new in self._kept.values() or (new != name and new in kept):
                new = f"input_{new}"
            self._kept[name] = new
        self.names = [*own, *self._kept.values()]

    def types(self, kept: Mapping[str, pa.DataType]) -> dict[str, pa.DataType]:
        """Arrow's types of all columns.

        Args:
            kept: those of the columns that are carried over; an unknown one (null) becomes a text.
        """
        found = dict.fromkeys(self.names, pa.string()) | {"row": pa.int64()} | dict.fromkeys(self._scores, pa.float32())
        return found | {
            self._kept[name]: pa.string() if pa.types.is_null(kind) else kind for name, kind in kept.items()
        }

    def values(self, piece: Piece, predictions: Predictions | None) -> dict[str, Sequence[Any]]:
        """The values of a piece, whose rows without a finite score get a reason.

        Args:
            piece: its rows.
            predictions: of the rows that can be scored, by their positions; None where there is none.
        """
        count = len(piece)
        score: list[list[float | None]] = [[None] * count for _ in self._scores]
        labels: list[str | None] = [None] * count
        if predictions is not None:
            self._fill(piece, predictions, score, labels)
        found: dict[str, Sequence[Any]] = {"row": range(piece.first_row, piece.first_row + count)}
        if self._several_files:
            found["file"] = [piece.file] * count
        found |= dict(zip(self._scores, score, strict=True))
        if self._schema.task != "regression":
            found["label"] = labels
        found["reason"] = piece.reasons
        return found | {new: piece.kept[name] for name, new in self._kept.items()}

    def _fill(
        self, piece: Piece, predictions: Predictions, score: list[list[float | None]], labels: list[str | None]
    ) -> None:
        found = scores(self._schema.task, predictions.logits)
        wide = found.reshape(len(found), -1)
        finite = wide.isfinite().all(dim=1).tolist()
        names = [] if self._schema.task == "regression" else decide(self._schema, found)
        columns = [_decimals(column) for column in wide.unbind(1)]
        for number, (row, sound) in enumerate(zip(predictions.rows.tolist(), finite, strict=True)):
            if not sound:
                piece.reasons[row] = NO_SCORE
                continue
            for target, values in zip(score, columns, strict=True):
                target[row] = values[number]
            if names:
                labels[row] = names[number]


def _decimals(values: Tensor) -> list[float]:
    """The shortest decimal numbers that are these float32 values."""
    return [float(str(value)) for value in values.numpy().astype(np.float32)]
