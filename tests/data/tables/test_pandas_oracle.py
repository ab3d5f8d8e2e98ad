"""Thirty files, read by pandas and by our readers: rows, texts and labels are equal, or docs/data.md says why not."""

from __future__ import annotations

import bz2
import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from lightning_bge.data.tables.config import TableConfig
from lightning_bge.data.tables.labels import encode_labels, fit_labels
from lightning_bge.data.tables.readers import read_table
from lightning_bge.errors import DataError

TEXT = 'text,label\na first one,1\n"a, second",0\nthird,1\n'
DOCS = Path(__file__).parents[3] / "docs" / "data.md"
STRINGS: dict[str, Any] = {"dtype": str, "keep_default_na": False}


@dataclass
class Case:
    """One file.

    Attributes:
        name: its name.
        content: its bytes, or a function that writes it.
        options: of `pandas.read_*`.
        config: ours.
        differs: words of docs/data.md that state the difference; None: the results are equal.
    """

    name: str
    content: bytes | Callable[[Path], Any]
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    differs: str | None = None


FRAME = pd.DataFrame({"text": ["a", "b\nb", 'c "c"', "é, 日本"], "label": [1, 0, 1, 0], "id": ["w", "x", "y", "z"]})
FLOATS = pd.DataFrame({"text": ["a", "b", "c"], "label": [1.0, 0.0, 1.0]})
BOOLS = pd.DataFrame({"text": ["a", "b", "c"], "label": [True, False, True]})
NAMES = pd.DataFrame({"text": ["NA", "null", "None", "nan", "N/A"], "label": ["yes", "no", "no", "yes", "no"]})

CASES = {
    "plain": Case("t.csv", TEXT.encode()),
    "no line end": Case("t.csv", TEXT.rstrip().encode()),
    "carriage returns": Case("t.csv", TEXT.replace("\n", "\r\n").encode()),
    "carriage returns alone": Case("t.csv", TEXT.replace("\n", "\r").encode()),
    "byte order mark": Case("t.csv", b"\xef\xbb\xbf" + TEXT.encode(), {"encoding": "utf-8-sig"}),
    "utf-16": Case("t.csv", TEXT.encode("utf-16"), {"encoding": "utf-16"}),
    "latin": Case(
        "t.csv", "text,label\ncafé,1\nthé,0\n".encode("cp1252"), {"encoding": "cp1252"}, {"encoding": "cp1252"}
    ),
    "semicolons": Case("t.csv", b"text;label\na, b;1\nc;0\n", {"sep": ";"}),
    "vertical bars": Case("t.csv", b"text|label\na, b|1\nc|0\n", {"sep": "|"}),
    "tabs": Case("t.tsv", b"text\tlabel\na, b\t1\nc\t0\n", {"sep": "\t"}),
    "tabs in a .csv": Case("t.csv", b"text\tlabel\na, b\t1\nc\t0\n", {"sep": "\t"}),
    "quoted tsv": Case("t.tsv", lambda path: FRAME.to_csv(path, sep="\t", index=False), {"sep": "\t"}),
    "quotes in a tsv": Case("t.tsv", b'text\tlabel\n"a" b\t1\n5" c\t0\n', {"sep": "\t", "quoting": 3}),
    "every field quoted": Case("t.csv", lambda path: FRAME.to_csv(path, index=False, quoting=1)),
    "escaped quotes": Case("t.csv", b'text,label\n"a \\"b\\"",1\nc,0\n', {"escapechar": "\\"}, {"escape": "\\"}),
    "more columns": Case("t.csv", lambda path: FRAME.to_csv(path)),
    "empty lines": Case("t.csv", TEXT.replace("\n", "\n\n").encode()),
    "numbers": Case("t.csv", lambda path: FLOATS.to_csv(path, index=False)),
    "booleans": Case("t.csv", lambda path: BOOLS.to_csv(path, index=False)),
    "words for missing values": Case("t.csv", lambda path: NAMES.to_csv(path, index=False)),
    "gzip": Case("t.csv.gz", gzip.compress(TEXT.encode())),
    "bzip2": Case("t.csv.bz2", bz2.compress(TEXT.encode())),
    "json array": Case("t.json", lambda path: FRAME.to_json(path, orient="records")),
    "json lines": Case("t.jsonl", lambda path: FRAME.to_json(path, orient="records", lines=True)),
    "json lines of floats": Case("t.jsonl", lambda path: FLOATS.to_json(path, orient="records", lines=True)),
    "parquet": Case("t.parquet", lambda path: FRAME.to_parquet(path)),
    "parquet of booleans": Case("t.parquet", lambda path: BOOLS.to_parquet(path)),
    "too few fields": Case("t.csv", b"text,label,id\na,1,x\nb,0\n", differs="too few or too many fields"),
    "text behind a quote": Case("t.csv", b'text,label\n"a" b,1\nc,0\n', differs="text behind a closing quote"),
    "rows between two quotes": Case(
        "t.csv", b'text,label\nx,1\n"a,1\nb,0\nc",0\nd,1\n', differs="whole rows between two quotes"
    ),
}


def by_pandas(path: Path, options: dict[str, Any]) -> pd.DataFrame:
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    if path.suffix in (".json", ".jsonl"):
        return pd.read_json(path, orient="records", lines=path.suffix == ".jsonl", dtype=False)
    return pd.read_csv(path, **STRINGS, **options)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_pandas_reads_is_what_we_read(case: Case, tmp_path: Path) -> None:
    path = tmp_path / case.name
    if callable(case.content):
        case.content(path)
    else:
        path.write_bytes(case.content)
    found = by_pandas(path, case.options)
    if case.differs is not None:
        assert case.differs in DOCS.read_text()
        with pytest.raises(DataError, match=r"row 2|line 2|line 3"):
            read_table(path, ("text",), label_column="label", config=TableConfig(**case.config))
        return
    table = read_table(path, ("text",), label_column="label", config=TableConfig(**case.config))
    assert [text for (text,) in table.texts] == found["text"].tolist()
    assert table.labels is not None
    names = fit_labels(table.labels, "binary", table.names)
    encoded = encode_labels(table.labels, names, "binary", table.names)
    positive = {"yes": 1.0, "no": 0.0, "1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0, "True": 1.0, "False": 0.0}
    assert encoded.tolist() == [positive[str(label)] for label in found["label"]]


def test_there_are_thirty() -> None:
    assert len(CASES) >= 30


def test_zstandard_which_pandas_needs_a_package_for(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.zst"
    path.write_bytes(pa.compress(TEXT.encode(), "zstd", asbytes=True))
    assert [text for (text,) in read_table(path, ("text",)).texts] == pd.read_csv(io.StringIO(TEXT))["text"].tolist()
