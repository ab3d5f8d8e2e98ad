from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.models.output.prediction_file import decide, write_predictions
from lightning_bge.types import Schema

ROWS = torch.tensor([2, 5, 6])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(tmp_path: Path, schema: Schema, logits: Any, labels: Any = None, **extra: Any) -> list[dict[str, str]]:
    path = tmp_path / "predictions.csv"
    found = Predictions(ROWS, torch.tensor(logits), None if labels is None else torch.tensor(labels))
    write_predictions(path, schema, found, extra)
    return read(path)


def test_binary(tmp_path: Path) -> None:
    schema = Schema("binary", ("no", "yes"), ("a",), 32, threshold=0.75)
    rows = write(tmp_path, schema, [[0.0], [3.0], [-3.0]], [1.0, 1.0, 0.0])
    assert rows == [
        {"row": "2", "score": "0.500000", "label": "no", "truth": "yes"},
        {"row": "5", "score": "0.952574", "label": "yes", "truth": "yes"},
        {"row": "6", "score": "0.047426", "label": "no", "truth": "no"},
    ]


def test_multiclass_with_names_that_need_quotes(tmp_path: Path) -> None:
    schema = Schema("multiclass", ("x,1", 'y "2"', "ä\nz"), ("a",), 32)
    rows = write(tmp_path, schema, [[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    assert [row["label"] for row in rows] == list(schema.labels)
    assert list(rows[0]) == ["row", "score:x,1", 'score:y "2"', "score:ä\nz", "label"]
    assert [sum(float(row[f"score:{label}"]) for label in schema.labels) for row in rows] == pytest.approx(
        [1] * 3, abs=3e-6
    )


def test_multilabel(tmp_path: Path) -> None:
    schema = Schema("multilabel", ("x", "y", "z"), ("a",), 32)
    rows = write(tmp_path, schema, [[1.0, -1.0, 0.0], [-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]], [[1.0, 0, 0]] * 3)
    assert [(row["label"], row["truth"]) for row in rows] == [("x|z", "x"), ("", "x"), ("x|y|z", "x")]
    assert rows[0]["score:y"] == "0.268941"


def test_regression_has_no_label(tmp_path: Path) -> None:
    schema = Schema("regression", (), ("a",), 32)
    rows = write(tmp_path, schema, [[0.25], [-1.5], [12.0]], [0.5, 1.0, 2.0])
    assert rows[1] == {"row": "5", "score": "-1.500000", "truth": "1"}


def test_extra_columns_come_last(tmp_path: Path) -> None:
    schema = Schema("binary", ("0", "1"), ("a",), 32)
    rows = write(tmp_path, schema, [[0.0]] * 3, fold=[1, 0, 2])
    assert [list(row)[-1] for row in rows] == ["fold"] * 3
    assert [row["fold"] for row in rows] == ["1", "0", "2"]


def test_columns_of_unequal_length_leave_the_old_file(tmp_path: Path) -> None:
    schema = Schema("binary", ("0", "1"), ("a",), 32)
    before = write(tmp_path, schema, [[0.0]] * 3)
    with pytest.raises(ValueError, match="shorter"):
        write(tmp_path, schema, [[1.0]] * 3, fold=[1])
    assert read(tmp_path / "predictions.csv") == before
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]


def test_a_score_at_the_threshold_is_a_yes() -> None:
    schema = Schema("binary", ("no", "yes"), ("a",), 32, threshold=0.5)
    assert decide(schema, torch.tensor([0.5, 0.49999])) == ["yes", "no"]
