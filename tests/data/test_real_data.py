"""Public data sets, where a folder holds them (environment variable LIGHTNING_BGE_DATA)."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.tables.splits import SplitConfig
from tests.helpers.paths import DATA


def need(name: str) -> Path:
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; LIGHTNING_BGE_DATA names the folder of the data sets")
    return folder


def test_rte(tokenizer_dir: str, tmp_path: Path) -> None:
    folder = need("rte")
    data = TextDataModule(
        tokenizer_dir,
        train_file=str(folder / "train.tsv"),
        val_file=str(folder / "dev.tsv"),
        text_columns=("sentence1", "sentence2"),
        cache_dir=str(tmp_path),
    )
    data.setup("fit")
    assert data.schema is not None
    assert data.schema.labels == ("not_entailment", "entailment")
    assert data.num_train_rows == len((folder / "train.tsv").read_text().splitlines()) - 1
    assert len(data.val_rows) == len((folder / "dev.tsv").read_text().splitlines()) - 1


def test_trecqa(tokenizer_dir: str, tmp_path: Path) -> None:
    folder = need("trecqa")
    data = TextDataModule(
        tokenizer_dir,
        train_file=str(folder / "train.csv"),
        text_columns=("qtext", "atext"),
        group_column="qtext",
        split=SplitConfig(folds=3),
        cache_dir=str(tmp_path),
    )
    data.setup("fit")
    with (folder / "train.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert data.num_train_rows == len(rows)
    assert data.train_labels is not None
    assert data.train_labels.tolist() == [float(row["label"]) for row in rows]
    assert data.group_names == tuple(sorted({row["qtext"] for row in rows}))


@pytest.mark.parametrize(
    ("task", "column"), [("multiclass", "entailment_judgment"), ("regression", "relatedness_score")]
)
def test_sick(tokenizer_dir: str, tmp_path: Path, task: str, column: str) -> None:
    folder = need("sick")
    data = TextDataModule(
        tokenizer_dir,
        task,  # type: ignore[arg-type]
        train_file=str(folder / "train.tsv"),
        val_file=str(folder / "dev.tsv"),
        test_file=str(folder / "test.tsv"),
        text_columns=("sentence_A", "sentence_B"),
        label_column=column,
        cache_dir=str(tmp_path),
    )
    data.setup("fit")
    data.setup("test")
    assert data.schema is not None
    assert data.schema.labels == (("CONTRADICTION", "ENTAILMENT", "NEUTRAL") if task == "multiclass" else ())
    sizes = [sum(batch.size for batch in loader) for loader in (data.val_dataloader(), data.test_dataloader())]
    assert [data.num_train_rows, *sizes] == [4500, 500, 4927]
