from __future__ import annotations

import decimal
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_bge.data.tables import columnar
from lightning_bge.data.tables.labels import fit_labels
from lightning_bge.data.tables.readers import read_table
from lightning_bge.errors import ConfigError, DataError

LABELS = datasets.ClassLabel(names=["neg", "pos"])


def test_types_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    text = pa.array(["NA", "b", "b"]).dictionary_encode()
    for labels, names in (
        (pa.array([1, 0, 1]), ("0", "1")),
        (pa.array([1.0, 0.0, 1.0]), ("0", "1")),
        (pa.array([True, False, True]), ("False", "True")),
        (pa.array([decimal.Decimal("1.0"), decimal.Decimal("0.0"), decimal.Decimal("1.0")]), ("0", "1")),
        (pa.array(["no", "yes", "no"]).dictionary_encode(), ("no", "yes")),
    ):
        pq.write_table(pa.table({"text": text, "label": labels}), path)
        table = read_table(path, ("text",), label_column="label")
        assert table.texts == [("NA",), ("b",), ("b",)]
        assert table.labels is not None
        assert fit_labels(table.labels, "binary", table.names) == names
    pd.DataFrame({"text": ["a", "b"], "label": [1, None]}).to_parquet(path)
    assert read_table(path, ("text",), label_column="label").labels == [1.0, None]
    pq.write_table(pa.table({"text": pa.array([b"a", b"b"])}), path)
    with pytest.raises(DataError, match="no text but bytes"):
        read_table(path, ("text",))


def test_a_data_set_from_disk(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": LABELS})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    data.save_to_disk(str(tmp_path / "one"))
    table = read_table(tmp_path / "one", ("text",), label_column="label")
    assert (table.texts, table.labels) == ([("a",), ("b",), ("c",)], ["pos", "neg", None])
    chosen = data.select([2, 0])  # rows in another order than in the file
    datasets.DatasetDict({"train": chosen, "test": data}).save_to_disk(str(tmp_path / "both"))
    assert read_table(tmp_path / "both" / "train", ("text",)).texts == [("c",), ("a",)]
    with pytest.raises(DataError, match=r"has several splits: name one, as in .*both/train"):
        read_table(tmp_path / "both", ("text",))
    with pytest.raises(DataError, match="no column 'b'; its columns are 'text', 'label'"):
        read_table(tmp_path / "one", ("b",))


def test_lists_of_named_labels(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "labels": datasets.List(LABELS)})
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "labels": [[1, 0], []]}, features=features)
    data.save_to_disk(str(tmp_path / "d"))
    assert read_table(tmp_path / "d", ("text",), label_column="labels").labels == [["pos", "neg"], []]


def test_a_data_set_of_the_hub_is_asked_for_by_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    data = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((name, config, split, revision))
        if name == "no/set":
            raise FileNotFoundError("there is none")
        return data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_table("hf://nyu-mll/glue/rte@v1:validation", ("text",), label_column="label").labels == [0]
    assert asked == [("nyu-mll/glue", "rte", "validation", "v1")]
    with pytest.raises(DataError, match=r"hf://no/set can't be loaded .*there is none"):
        read_table("hf://no/set", ("text",))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'lightning-bge\[datasets\]'"):
        columnar.HFDataset("hf://owner/name")
