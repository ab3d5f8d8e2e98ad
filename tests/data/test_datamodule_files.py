"""A data module of several files, FlagEmbedding's lines, a column for each label; its words on labels and copies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.sources import has_groups
from lightning_bge.data.tables.config import TableConfig
from lightning_bge.errors import ConfigError, DataError
from lightning_bge.types import Schema
from tests.helpers.small_texts import random_texts

Write = Callable[[str, "str | bytes"], Path]
Make = Callable[..., TextDataModule]


@pytest.fixture
def make(tokenizer_dir: str, tmp_path: Path) -> Make:
    def build(**options: Any) -> TextDataModule:
        return TextDataModule(**{"tokenizer": tokenizer_dir, "cache_dir": str(tmp_path / "cache"), **options})

    return build


@pytest.fixture
def texts() -> list[str]:
    return [f"{a} {number}" for number, (a, _) in enumerate(random_texts(40, seed=2))]


def csv(texts: list[str], labels: list[Any]) -> str:
    return "text,label\n" + "".join(f'"{text}",{label}\n' for text, label in zip(texts, labels, strict=True))


def test_parts_are_one_training_file(make: Make, write: Write, texts: list[str], tmp_path: Path) -> None:
    labels = [row % 2 for row in range(40)]
    whole = write("whole.csv", csv(texts, labels))
    write("part1.csv", csv(texts[:25], labels[:25]))
    write("part2.csv", csv(texts[25:], [f"{label}.0" for label in labels[25:]]))
    modules = [
        make(train_file=files, text_columns="text")
        for files in (
            str(whole),
            str(tmp_path / "part?.csv"),
            [str(tmp_path / f"part{number}.csv") for number in (1, 2)],
        )
    ]
    for data in modules:
        data.setup("fit")
    assert len({data.folds_hash for data in modules}) == 1
    for data in modules[1:]:
        np.testing.assert_array_equal(data.train_labels, modules[0].train_labels)
        np.testing.assert_array_equal(data.lengths("train"), modules[0].lengths("train"))
        assert json.loads(json.dumps(data.hparams)) == data.hparams
    write("part2.csv", csv(texts[25:], ["other", *labels[26:]]))
    with pytest.raises(DataError, match=r"binary needs two labels.*3"):
        make(train_file=str(tmp_path / "part?.csv"), text_columns="text").setup("fit")


def test_texts_of_a_query_are_pairs_in_groups(make: Make, write: Write, texts: list[str]) -> None:
    def lines(queries: range) -> str:
        return "\n".join(
            json.dumps({"query": f"q{number}", "pos": [texts[2 * number]], "neg": [texts[2 * number + 1]]})
            for number in queries
        )

    data = make(
        train_file=str(write("t.jsonl", lines(range(15)))), test_file=str(write("u.jsonl", lines(range(15, 20))))
    )
    data.setup("fit")
    assert data.schema is not None
    assert data.schema.text_columns == ("query", "passage")
    assert data.schema.labels == ("0", "1")
    assert len(data.group_names) == 15
    assert data.num_train_rows == 30
    data.setup("test")
    assert sum(batch.size for batch in data.test_dataloader()) == 10


def test_one_column_for_each_label(make: Make, write: Write, texts: list[str]) -> None:
    rows = [{"text": text, "toxic": row % 2, "rude": str(row % 3 == 0)} for row, text in enumerate(texts)]
    path = str(write("t.jsonl", "\n".join(map(json.dumps, rows))))
    data = make(train_file=path, task="multilabel", text_columns="text", label_column=["toxic", "rude"])
    data.setup("fit")
    assert data.schema is not None
    assert data.schema.labels == ("toxic", "rude")
    expected = [[row % 2, row % 3 == 0] for row in range(40)]
    np.testing.assert_array_equal(data.train_labels, np.array(expected, dtype=np.float32))
    with pytest.raises(ConfigError, match=r"label_column: a binary task has one, got \['toxic', 'rude'\]"):
        make(label_column=["toxic", "rude"])


@pytest.mark.parametrize(
    ("labels", "positive"),
    [(("1", "2"), "2"), (("no", "yes"), "yes"), (("good", "bad"), "good"), (("0", "1"), "1"), (("-1", "1"), "1")],
)
def test_the_positive_label_is_named_and_can_be_changed(
    make: Make, write: Write, texts: list[str], labels: tuple[str, str], positive: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(write("t.csv", csv(texts, [labels[row % 2] for row in range(40)])))
    data = make(train_file=path, text_columns="text")
    with caplog.at_level("INFO", "lightning_bge"):
        data.setup("fit")
        make(train_file=path, text_columns="text").setup("fit")
    [negative] = set(labels) - {positive}
    said = [record.message for record in caplog.records if "is the positive label" in record.message]
    assert len(said) == 1
    assert f"{positive!r} is the positive label, {negative!r} the negative one" in said[0]
    assert f"--data.table.labels '[{positive}, {negative}]'" in said[0]
    assert data.schema is not None
    assert data.schema.labels == (negative, positive)
    other = make(train_file=path, text_columns="text", table=TableConfig(labels=(positive, negative)))
    other.setup("fit")
    assert other.schema is not None
    assert other.schema.labels == (positive, negative)


def test_copies_on_both_sides_are_named_once(
    make: Make, write: Write, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    labels = [row % 2 for row in range(40)]
    train, test = write("train.csv", csv(texts[:30], labels[:30])), write("test.csv", csv(texts[20:], labels[20:]))
    for _ in range(2):
        data = make(train_file=str(train), test_file=str(test), text_columns="text")
        data.setup("fit")
        data.test_hash()
        data.setup("test")
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.message.startswith(f"{test}: 10 of 20 rows (50.0%) have the same texts as rows that are trained on")
    caplog.clear()
    twice = write("twice.csv", csv(texts[:20] * 2, labels[:20] * 2))
    make(train_file=str(twice), text_columns="text").setup("fit")
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert f"{twice}: " in record.message
    assert "of 8 validation rows" in record.message


def test_an_exported_model_is_validated_as_it_was_trained(
    make: Make, write: Write, texts: list[str], tokenizer_dir: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tokenizer_dir, model)
    Schema("binary", ("yes", "no"), ("text",), 16, threshold=0.8).save(model)
    path = str(write("t.csv", csv(texts, [("no", "yes")[row % 2] for row in range(40)])))
    data = make(tokenizer=str(model), train_file=path)
    data.setup("validate")
    assert data.schema == Schema("binary", ("yes", "no"), ("text",), 16, threshold=0.8)
    np.testing.assert_array_equal(data.train_labels, [1.0, 0.0] * 20)
    data = make(tokenizer=str(model), train_file=path, text_columns="text")
    data.setup("fit")  # a new training run goes by its own options
    assert data.schema == Schema("binary", ("no", "yes"), ("text",), 512)
    for stage in ("validate", "test", "predict"):
        files = dict.fromkeys(("train_file", "test_file", "predict_file"), path)
        with pytest.raises(ConfigError, match=r"was trained on single texts \(text\), got text_a, text_b"):
            make(tokenizer=str(model), text_columns=("text_a", "text_b"), **files).setup(stage)


def test_groups_that_a_file_brings_are_known_before_it_is_read(write: Write) -> None:
    pairs = str(write("t.jsonl", json.dumps({"query": "q", "pos": ["p"], "neg": ["n"]})))
    rows = str(write("u.jsonl", json.dumps({"query": "q", "passage": "p", "label": 1})))
    assert has_groups(TextDataModule(train_file=pairs).hparams)
    assert has_groups(TextDataModule(test_file=pairs).hparams)
    assert not has_groups(TextDataModule(train_file=rows).hparams)
    assert has_groups(TextDataModule(train_file=rows, group_column="query").hparams)
    assert not has_groups(TextDataModule().hparams)


def test_the_same_rows_have_one_hash_in_every_format(make: Make, write: Write, texts: list[str]) -> None:
    rows = [{"text": text, "label": row % 2} for row, text in enumerate(texts)]
    files = [
        write("a.csv", csv(texts, [row["label"] for row in rows])),
        write("b.csv", csv(texts, [float(row["label"]) for row in rows])),
        write("c.csv", csv(texts, [bool(row["label"]) for row in rows])),
        write("d.jsonl", "\n".join(map(json.dumps, rows))),
    ]
    hashes = []
    for file in files:
        data = make(train_file=str(file), text_columns="text")
        data.setup("fit")
        hashes.append(data.data_hash)
    assert len(set(hashes)) == 1
    other = make(
        train_file=str(write("e.csv", csv(texts, [1, *(row["label"] for row in rows[1:])]))), text_columns="text"
    )
    other.setup("fit")
    assert other.data_hash != hashes[0]
