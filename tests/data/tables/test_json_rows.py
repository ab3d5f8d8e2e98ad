from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from lightning_bge.data.tables.config import TableConfig
from lightning_bge.data.tables.readers import has_pairs, read_table
from lightning_bge.errors import DataError

Write = Callable[[str, "str | bytes"], Path]
ROWS = [{"text": "a", "label": 1}, {"text": "b\nc", "label": None}, {"text": "NaN", "label": 0.5}]


@pytest.mark.parametrize("name", ["t.json", "t.jsonl"])
def test_arrays_and_lines_as_pandas_writes_them(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    pd.DataFrame(ROWS).to_json(path, orient="records", lines=name == "t.jsonl")
    table = read_table(path, ("text",), label_column="label")
    assert table.texts == [("a",), ("b\nc",), ("NaN",)]
    assert table.labels == [1.0, None, 0.5]


def test_an_array_may_have_lines_and_nan_is_missing(write: Write) -> None:
    table = read_table(write("t.json", json.dumps(ROWS, indent=2)), ("text",), label_column="label")
    assert table.labels == [1, None, 0.5]
    table = read_table(write("n.jsonl", '{"text": "NaN", "label": NaN}\n'), ("text",), label_column="label")
    assert (table.texts, table.labels) == ([("NaN",)], [None])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", '{"text": {"0": "a"}}', r"one object with columns, as by pandas.*orient='records'"),
        ("t.json", '{"text": ["a", "b"]}', "one object with columns"),
        ("t.jsonl", '{"data": [{"text": "a"}]}', "the rows in its field 'data': write that list alone"),
        ("t.json", '{"0": {"text": "a"}, "1": {"text": "b"}}', "one object with columns"),
        ("t.json", '{"data":\n [{"text": "a"}]}', "line 1 is not valid JSON.*An array of objects"),
        ("t.json", '[{"text": "a"}', "is not valid JSON"),
        ("t.json", '["a"]', "row 1 must hold one JSON object"),
        ("t.json", "[]", "has no rows"),
        ("t.jsonl", '{"text": "a", "text": "b"}', "line 1 has the field 'text' twice"),
        ("t.jsonl", '{"text": "a"}\n{"text": "\\ud800"}', r"half a surrogate pair.*\(data row 2"),
        ("t.jsonl", '{"text": NaN}', "has empty text"),
        ("t.jsonl", '{"Text": "a"}', r"no column 'text' \(did you mean 'Text'\?\)"),
        ("t.jsonl", '"a"\n', "line 1 must hold one JSON object"),
        ("t.jsonl", "[" * 100_000, "nested too deeply|not valid JSON"),
    ],
)
def test_what_is_no_rows_is_refused(write: Write, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_table(write(name, content), ("text",))


def test_texts_of_a_query_are_pairs_in_a_group(write: Write) -> None:
    lines = [
        {"query": "q1", "pos": ["p1"], "neg": ["n1", "n2"], "prompt": "x"},
        {"query": "q2", "pos": ["p2", "p3"]},
        {"query": "q3", "pos": [], "neg": None},
    ]
    path = write("t.jsonl", "\n".join(map(json.dumps, lines)))
    assert has_pairs(path, TableConfig())
    table = read_table(path, ("query", "passage"), label_column="label", group_column="query")
    assert table.texts == [("q1", "p1"), ("q1", "n1"), ("q1", "n2"), ("q2", "p2"), ("q2", "p3")]
    assert table.labels == [1, 0, 0, 1, 1]
    assert table.groups == ["q1", "q1", "q1", "q2", "q2"]
    wrong = write("w.jsonl", '{"query": "q", "pos": ["p"]}\n{"query": "q", "pos": "p"}\n')
    with pytest.raises(DataError, match="line 2 must hold a query and its texts"):
        read_table(wrong, ("query", "passage"))
    assert not has_pairs(write("p.jsonl", '{"query": "q", "passage": "p", "label": 1}'), TableConfig())
