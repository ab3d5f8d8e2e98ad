"""What is known of labels before a file is read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.sources import known_schema, labels_origin
from lightning_bge.types import Schema
from tests.helpers.small_models import small_config


@pytest.mark.parametrize(
    ("names", "table", "positive"),
    [(("good", "bad"), {}, "bad"), (("LABEL_0", "LABEL_1"), {}, "1"), (("a", "b"), {"labels": ["b", "a"]}, "a")],
)
def test_the_positive_label_of_a_binary_checkpoint_is_logged(
    tmp_path: Path, names: tuple[str, ...], table: Any, positive: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config("bert", 2)
    config.id2label = dict(enumerate(names))
    config.save_pretrained(tmp_path)
    file = tmp_path / "p.csv"
    file.write_text("text\na\n")
    data = TextDataModule(str(tmp_path), predict_file=str(file), text_columns=("text",), table=table)
    with caplog.at_level(logging.INFO, "lightning_bge"):
        assert known_schema(data, str(file)).labels[1] == positive
    assert [f"{positive!r} is the positive label" in record.message for record in caplog.records].count(True) == 1


def test_where_the_names_of_labels_come_from(tmp_path: Path) -> None:
    assert labels_origin(TextDataModule(str(tmp_path)), False) == "the model"
    assert labels_origin(TextDataModule(str(tmp_path), train_file="a.csv"), False) == "the training file"
    named = TextDataModule(str(tmp_path), train_file="a.csv", table={"labels": ["a", "b"]})  # type: ignore[arg-type]
    assert labels_origin(named, False) == "data.table.labels"
    Schema("binary", ("no", "yes"), ("text",), 16).save(tmp_path)
    assert labels_origin(named, False) == "the model"  # an exported model brings its own
    assert labels_origin(named, True) == "data.table.labels"
