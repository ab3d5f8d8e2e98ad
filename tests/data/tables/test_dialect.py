from __future__ import annotations

import csv
import io
from typing import Any

import pandas as pd
import pytest

from lightning_bge.data.tables.config import TableConfig
from lightning_bge.data.tables.dialect import Dialect, find_delimiter, is_quoted

ROWS = [["a text", "1"], ["with\ttab", "2"], ['said "yes"', "3"], ["two\nlines", "-4.5"]]


@pytest.mark.parametrize(
    ("line", "names", "default", "delimiter"),
    [
        ("text,label\n", ["text", "label"], ",", ","),
        ("text;label\n", ["text", "label"], ",", ";"),
        ("text|label\r\n", ["label"], ",", "|"),
        ("text\tlabel\n", ["text"], ",", "\t"),
        ("text,label\n", ["text"], "\t", ","),
        ('"text;a";label\n', ["text;a", "label"], ",", ";"),
        ("text\n", ["text"], ",", ","),
        ("text;x,label\n", ["text;x"], ",", ","),
        ("text;label;id\n", ["other"], ",", ";"),  # for the message: the most columns
        ("text;label\n", [], ",", ";"),
        ("text;la,bel\n", [], ",", ","),
    ],
)
def test_the_delimiter_is_the_one_that_gives_the_columns(
    line: str, names: list[str], default: str, delimiter: str
) -> None:
    assert find_delimiter(line, names, default, TableConfig()) == delimiter
    assert find_delimiter(line, names, default, TableConfig(delimiter="#")) == "#"


@pytest.mark.parametrize("style", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_quotes_that_a_program_writes_enclose_fields(style: Any, line_end: str) -> None:
    rows: list[list[Any]] = [[text, float(number)] for text, number in ROWS]
    frame = pd.DataFrame(rows, columns=["text", "value"])
    text = frame.to_csv(sep="\t", index=False, quoting=style, lineterminator=line_end)
    assert is_quoted(io.StringIO(text, newline=""), Dialect("\t", quoting=True))
    # and a text that is not enclosed in such a file
    assert not is_quoted(io.StringIO(text + 'he "said\t1\n', newline=""), Dialect("\t", quoting=True))


@pytest.mark.parametrize(
    "text",
    [
        "text\tlabel\nno quote\t1\n",
        'text\tlabel\n"Hello" she said\t1\n',
        'text\tlabel\n5" pipe\t1\n',
        'text\tlabel\n"Yes."\t1\nand no\t0\n',  # a text in quotes, as in GLUE: no program encloses it
        'text\tlabel\n"open\t1\n',
    ],
)
def test_quotes_of_a_text_do_not(text: str) -> None:
    assert not is_quoted(io.StringIO(text, newline=""), Dialect("\t", quoting=True))


def test_an_escaped_quote() -> None:
    assert next(Dialect(",", True, "\\").reader(['"say \\"yes\\", please",1\n'])) == ['say "yes", please', "1"]
    assert next(Dialect(",", False).reader(['"a",\\b\n'])) == ['"a"', "\\b"]
