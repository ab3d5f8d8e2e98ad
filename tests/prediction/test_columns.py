"""What is written for each row."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from lightning_bge.data.pieces import Piece
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.prediction.columns import NO_SCORE, ResultColumns
from lightning_bge.types import Schema

BINARY = Schema("binary", ("no", "yes"), ("text",), 32, threshold=0.5)


def piece(*reasons: str | None, **kept: list[object]) -> Piece:
    return Piece("f.csv", 10, dict(kept), [], list(reasons))


def found(logits: list[list[float]], rows: list[int] | None = None) -> Predictions:
    return Predictions(torch.tensor(rows or range(len(logits))), torch.tensor(logits))


def test_rows_without_a_score_keep_their_place() -> None:
    columns = ResultColumns(BINARY, ["id"], False)
    values = columns.values(piece(None, "empty text", None, id=[7, 8, 9]), found([[2.0], [-2.0]], [0, 2]))
    assert list(values) == columns.names == ["row", "score", "label", "reason", "id"]
    assert list(values["row"]) == [10, 11, 12]
    assert values["label"] == ["yes", None, "no"]
    assert values["reason"] == [None, "empty text", None]
    assert values["id"] == [7, 8, 9]
    assert values["score"][1] is None
    expected = torch.tensor([2.0, -2.0]).sigmoid().numpy()
    assert np.array_equal(np.float32([values["score"][0], values["score"][2]]), expected)


def test_nothing_can_be_scored() -> None:
    values = ResultColumns(BINARY, [], True).values(piece("x", "y"), None)
    assert values["score"] == values["label"] == [None, None]
    assert values["file"] == ["f.csv", "f.csv"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_has_a_reason(value: float) -> None:
    schema = Schema("regression", (), ("text",), 32)
    columns = ResultColumns(schema, [], False)
    values = columns.values(piece(None, None), found([[value], [0.25]]))
    assert columns.names == ["row", "score", "reason"]
    assert values["score"] == [None, 0.25]
    assert values["reason"] == [NO_SCORE, None]


def test_several_labels() -> None:
    logits = [[3.0, -3.0, 1.0], [-3.0, -3.0, -3.0]]
    values = ResultColumns(Schema("multilabel", ("a", "b", "c"), ("t",), 8), [], False).values(
        piece(None, None), found(logits)
    )
    assert values["label"] == ["a|c", ""]
    assert np.array_equal(np.float32(values["score:b"]), torch.tensor([-3.0, -3.0]).sigmoid().numpy())
    values = ResultColumns(Schema("multiclass", ("a", "b", "c"), ("t",), 8), [], False).values(
        piece(None, None), found(logits)
    )
    assert values["label"] == ["a", "a"]
    assert sum(values[f"score:{name}"][0] for name in "abc") == pytest.approx(1, abs=1e-6)


def test_names_that_are_taken_get_a_prefix() -> None:
    kept = ["id", "label", "score", "truth", "input_label", "score:a", "reason", "file"]
    names = ResultColumns(BINARY, kept, False).names
    assert len(set(names)) == len(names)
    assert names[4:] == [
        "id", "input_input_label", "input_score", "input_truth", "input_label", "score:a", "input_reason", "input_file"
    ]  # fmt: skip
    multi = ResultColumns(Schema("multiclass", ("a", "b"), ("t",), 8), kept, False).names
    assert "input_score:a" in multi
    assert multi.count("score:a") == 1


def test_types() -> None:
    types = ResultColumns(BINARY, ["id", "none"], True).types({"id": pa.int16(), "none": pa.null()})
    assert types == {
        **dict.fromkeys(("file", "label", "reason", "none"), pa.string()),
        **{"row": pa.int64(), "score": pa.float32(), "id": pa.int16()},
    }
