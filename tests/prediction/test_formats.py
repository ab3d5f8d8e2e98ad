"""Rows of predictions, read back by pandas, pyarrow, json and our own readers."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_bge.data.tables.config import TableConfig
from lightning_bge.data.tables.readers import read_chunks
from lightning_bge.errors import ConfigError, DataError
from lightning_bge.prediction.formats import OutputFormat, common_type, type_of

TEXTS = [
    "plain",
    'a "quote"',
    "comma, tab\t",
    "line\nend",
    "carriage\rreturn",
    "\r\n",
    "ä 漢 \U0001f600",
    "NA",
    " x ",
    "'",
    "\\",
]
COLUMNS: dict[str, list[Any]] = {
    "row": list(range(len(TEXTS))),
    "score": [float(str(np.float32(value))) for value in np.random.default_rng(0).random(len(TEXTS))],
    'name, "quoted"\tü': TEXTS,
    "missing": [None if row % 2 else f"t{row}" for row in range(len(TEXTS))],
}


def write(path: Path, columns: dict[str, list[Any]], types: dict[str, pa.DataType] | None = None) -> None:
    """As a run does: the header and two pieces are appended to a draft, of which the file is made."""
    form = OutputFormat.of(str(path))
    known = {name: type_of(values) for name, values in columns.items()} | (types or {})
    encoder, draft, half = form.encoder(list(columns), known), path.with_name("draft"), len(columns["row"]) // 2
    parts = [{name: values[part] for name, values in columns.items()} for part in (slice(half), slice(half, None))]
    draft.write_bytes(encoder.header + b"".join(map(encoder.encode, parts)))
    form.complete(draft, path)
    assert not draft.exists()


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.tsv.bz2", "a.csv.zst", "a.CSV"])
def test_delimited_text_is_read_back(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(path, COLUMNS)
    options: dict[str, Any] = {"sep": "\t" if ".tsv" in name else ",", "keep_default_na": False, "lineterminator": None}
    found = pd.read_csv(path, **options) if name != "a.csv.zst" else None
    if found is not None:
        assert {column: found[column].tolist() for column in found} == {
            **COLUMNS,
            "missing": [value or "" for value in COLUMNS["missing"]],
        }
    (chunk,) = read_chunks(str(path), list(COLUMNS), TableConfig())
    as_text = {column: ["" if value is None else str(value) for value in COLUMNS[column]] for column in COLUMNS}
    assert chunk.columns == as_text
    assert np.array_equal(np.array(chunk.columns["score"], np.float32), np.array(COLUMNS["score"], np.float32))


def test_values_of_json_keep_their_types(tmp_path: Path) -> None:
    columns = {"row": [0, 1], "any": [1, "x"], "list": [["a", None], {"b": [1.5]}], "half": ["\ud800", True]}
    write(tmp_path / "a.jsonl", columns)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows == [{name: values[row] for name, values in columns.items()} for row in range(2)]


def test_texts_of_json_are_read_back_by_pandas(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl.gz", COLUMNS)
    found = pd.read_json(tmp_path / "a.jsonl.gz", lines=True, precise_float=True, dtype=False)
    assert found.iloc[:, 2].tolist() == TEXTS
    assert found["score"].tolist() == COLUMNS["score"]


def test_types_of_parquet_are_kept(tmp_path: Path) -> None:
    types = {
        "row": pa.int64(),
        "small": pa.int8(),
        "when": pa.timestamp("us", tz="UTC"),
        "day": pa.date32(),
        "money": pa.decimal128(7, 2),
        "list": pa.list_(pa.float32()),
        "bytes": pa.binary(),
        "large": pa.large_string(),
        "flag": pa.bool_(),
    }
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5, 6, tzinfo=datetime.UTC)
    columns: dict[str, list[Any]] = {
        "row": [0, 1, 2],
        "small": [1, None, -3],
        "when": [moment, None, moment],
        "day": [moment.date(), None, moment.date()],
        "money": [decimal.Decimal("1.50"), None, decimal.Decimal("-2.25")],
        "list": [[1.5], None, []],
        "bytes": [b"\xff", None, b""],
        "large": ["x", None, ""],
        "flag": [True, None, False],
    }
    write(tmp_path / "a.parquet", columns, types)
    found = pq.read_table(tmp_path / "a.parquet")
    assert dict(zip(found.schema.names, found.schema.types, strict=True)) == types
    assert found.to_pydict() == columns


def test_columns_of_mixed_values_become_texts_in_parquet(tmp_path: Path) -> None:
    values = [1, "x", None, [1], {"a": True}, False]
    write(tmp_path / "a.parquet", {"row": list(range(6)), "any": values})
    assert pq.read_table(tmp_path / "a.parquet")["any"].to_pylist() == ["1", "x", None, "[1]", '{"a": true}', "false"]


def test_a_value_that_a_type_can_not_hold_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="keep: column 'any' can't be written as int8"):
        write(tmp_path / "a.parquet", {"row": [0, 1], "any": [1, 1000]}, {"any": pa.int8()})


def test_common_types() -> None:
    assert common_type(pa.null(), pa.int32()) == pa.int32()
    assert common_type(pa.int32(), pa.int64()) == pa.int64()
    assert common_type(pa.int64(), pa.string()) == pa.string()
    assert common_type(pa.null(), pa.dictionary(pa.int8(), pa.string())) == pa.string()
    assert type_of([2**70]) == type_of([1, "x"]) == pa.string()


@pytest.mark.parametrize("name", ["a.txt", "a", "a.gz", "a.parquet.gz", "a.csv.xz", "a.json", "csv"])
def test_other_endings_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"output: expected a name that ends in .csv.*got {name}"):
        OutputFormat.of(name)


def test_formats_of_streams() -> None:
    assert OutputFormat.of("/dev/stdout", stream=True) == OutputFormat("csv")
    assert OutputFormat.of("pipe.jsonl", stream=True) == OutputFormat("jsonl")
    for name in ("pipe.csv.gz", "pipe.parquet"):
        with pytest.raises(ConfigError, match="a pipe takes csv, tsv or jsonl"):
            OutputFormat.of(name, stream=True)
