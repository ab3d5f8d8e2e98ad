from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_bge.data.tables.config import TableConfig
from lightning_bge.data.tables.readers import read_table
from lightning_bge.errors import ConfigError, DataError

Write = Callable[[str, "str | bytes"], Path]
DEFAULT = TableConfig()


def read(path: Path, config: TableConfig = DEFAULT, group: str | None = None, **options):  # type: ignore[no-untyped-def]
    return read_table(path, ("a", "b"), label_column="label", group_column=group, config=config, **options)


GOOD = [("x1", "y1"), ("x2", "y2")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "a,b,label\nx1,y1,0\nx2,y2,1\n"),
        ("t.csv", "a,b,label\r\nx1,y1,0\r\nx2,y2,1\r\n"),
        ("t.csv", b"\xef\xbb\xbfa,b,label\nx1,y1,0\nx2,y2,1"),
        ("t.csv", "other,label,b,a\n9,0,y1,x1\n\n9,1,y2,x2\n\n"),
        ("t.TSV", "a\tb\tlabel\nx1\ty1\t0\nx2\ty2\t1\n"),
        ("t.txt", "a\tb\tlabel\nx1\ty1\t0\nx2\ty2\t1\n"),
        ("t.jsonl", '{"a":"x1","b":"y1","label":"0"}\n\n{"label":"1","b":"y2","a":"x2"}\n'),
        ("t.json", b'\xef\xbb\xbf{"a":"x1","b":"y1","label":"0"}\n{"label":"1","b":"y2","a":"x2"}'),
    ],
)
def test_rows_of_each_format(write: Write, name: str, content: str | bytes) -> None:
    table = read(write(name, content))
    assert table.texts == GOOD
    assert table.labels == ["0", "1"]
    assert table.groups is None


def test_parquet_with_lists(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": ["x1", "x2"], "b": ["y1", "y2"], "label": [["p"], []], "g": [1, 2]}), path)
    table = read(path, group="g")
    assert (table.texts, table.labels, table.groups) == (GOOD, [["p"], []], ["1", "2"])


def test_quotes_in_csv_and_tsv(write: Write) -> None:
    csv = read(write("t.csv", 'a,b,label\n"x, ""1""\nz",y1,0\nNA,null,1\n'))
    assert csv.texts == [('x, "1"\nz', "y1"), ("NA", "null")]
    tsv = read(write("t.tsv", 'a\tb\tlabel\n"x1\ty1"\t0\n"x2"\ty2\t1\n'))
    assert tsv.texts == [('"x1', 'y1"'), ('"x2"', "y2")]
    quoted = read(write("q.tsv", 'a\tb\tlabel\n"x\t1"\ty1\t0\n'), TableConfig(quoting=True))
    assert quoted.texts == [("x\t1", "y1")]
    bare = read(write("b.csv", 'a,b,label\n"x1,y1,0\n'), TableConfig(quoting=False))
    assert bare.texts == [('"x1', "y1")]
    inch = read(write("i.csv", 'a,b,label\n5" pipe,y1,0\n'))
    assert inch.texts == [('5" pipe', "y1")]


def test_format_rows_and_columns_can_be_chosen(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("t.data", "a,b,label,g\nx1,y1,0,p\nx2,y2,1,q\n")
    table = read(path, TableConfig(format="csv"), "g", max_rows=1)
    assert (table.texts, table.labels, table.groups) == (GOOD[:1], ["0"], ["p"])
    one = read_table(path, ("b",), config=TableConfig(format="csv"))
    assert (one.texts, one.labels) == ([("y1",), ("y2",)], None)
    monkeypatch.setenv("HOME", str(path.parent))
    assert read_table("~/t.data", ("a",), config=TableConfig(format="csv")).texts == [("x1",), ("x2",)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "is empty"),
        ("t.csv", "a,b,label\n", "no rows"),
        ("t.jsonl", "\n\n", "no rows"),
        ("t.csv", "\n\n", "is empty: its first line must name the columns"),
        ("t.csv", "a,c,label\n1,2,0\n", r"no column 'b'; its columns are 'a', 'c', 'label'"),
        ("t.csv", "a,b,b,label\n1,2,2,0\n", "more than one column 'b'"),
        ("t.csv", "a,b,label\nx,y,0\n ,y,0\n,y,0\n", r"'a' has empty text in 2 of 3 rows \(data rows 2, 3"),
        (
            "t.csv",
            "a,b,label\nx,y,0\nx,y\n",
            r"row 2 \(line 3\) has 2 fields, expected 3 with comma between fields, utf-8: 'x,y'",
        ),
        ("t.csv", 'a,b,label\nx,y,0\n"x,y,0\nx,y,0\n', "a quote that line 3 opens is not closed up to line 4"),
        ("t.csv", b"a,b,label\nx,\xff,0\n", "line 2 is not valid UTF-8"),
        ("t.csv", b"a,\xff,label\nx,y,0\n", "line 1 is not valid UTF-8"),
        ("t.jsonl", b'{"a":"\xff"}\n', "line 1 is not valid UTF-8"),
        ("t.jsonl", '{"a":"x","b":"y","label":0}\n{"a":', "line 2 is not valid JSON"),
        ("t.jsonl", "[1]\n", "row 1 must hold one JSON object"),
        ("t.jsonl", '{"a":"x","b":"y","label":0}\n{"a":"x","label":0}\n', "line 2 has no 'b'"),
        ("t.jsonl", '{"a":null,"b":"y","label":0}\n', "'a' has empty text in 1 of 1 rows"),
        ("t.jsonl", '{"a":["x"],"b":"y","label":0}\n', "'a' has no text but list in 1 of 1 rows"),
        ("t.parquet", "not a parquet file", "can't be read as Parquet"),
        ("t.xlsx", "x", r"unknown ending; known are \.csv.* data\.table\.format"),
    ],
)
def test_faulty_files_are_refused_with_the_row(write: Write, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(name, content))


def test_empty_line_of_one_column_is_an_empty_text(write: Write) -> None:
    with pytest.raises(DataError, match="'a' has empty text in 1 of 3 rows"):
        read_table(write("t.csv", "a\nx\n\ny\n"), ("a",))


def test_missing_file_and_columns(tmp_path: Path, write: Write) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "no.csv")
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="one or two"):
        read_table(write("t.csv", "a\n1\n"), ("a", "b", "c"))
    with pytest.raises(DataError, match="'g' has an empty value"):
        read(write("t.csv", "a,b,label,g\nx,y,0,\n"), group="g")


@pytest.mark.parametrize("bad", [{"format": "xml"}, {"max_rows": 0}, {"label_separator": ""}])
def test_wrong_options_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"data.table.{next(iter(bad))}"):
        TableConfig(**bad)  # type: ignore[arg-type]


def test_groups_have_one_name_however_they_are_written(write: Write) -> None:
    path = write("t.csv", "a,b,label,g\nx1,y1,0,3\nx2,y2,1,3.0\nx1,y1,0, 3 \nx2,y2,1,03\nx2,y2,1,3.5\n")
    assert read(path, group="g").groups == ["3", "3", "3", "03", "3.5"]
    assert read(write("t.jsonl", '{"a":"x","b":"y","label":0,"g":3.0}\n'), group="g").groups == ["3"]


def test_a_label_is_no_text(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"data\.label_column: \['a'\] are in data\.text_columns too"):
        read_table(write("t.csv", "a\nx\n"), ("a",), label_column="a")


def test_an_array_may_have_the_ending_of_lines(write: Write) -> None:
    assert read(write("t.jsonl", '[{"a":"x1","b":"y1","label":0},{"a":"x2","b":"y2","label":1}]')).texts == GOOD
