from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_bge.data.tables.config import TableConfig
from lightning_bge.data.tables.delimited import DelimitedFile
from lightning_bge.errors import DataError

Write = Callable[[str, "str | bytes"], Path]


def rows(path: Path, names: tuple[str, ...] = ("text", "label"), **options: Any) -> list[tuple[str, ...]]:
    kind = path.suffix[1:]
    file = DelimitedFile(path, kind, names, TableConfig(**options))
    pieces = list(file.rows(names, 3))
    assert all(len(piece[names[0]]) <= 3 for piece in pieces)
    return [row for piece in pieces for row in zip(*(piece[name] for name in names), strict=True)]


def swallowed(first: str, last: str, between: int = 8) -> str:
    lines = ["text,label", "a good one,1", "a bad one,0", first]
    lines += [f"thing {number},{number % 2}" for number in range(between)]
    return "\n".join([*lines, last, "the end,1", ""])


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ('"Hello she said,0', '"Bye,0'),
        ('"Hello she said,0', 'so she said bye",1'),
        ('"Hello,0', 'bye",1'),
        ('"Hello,0', '"",1'),
        ('"Hello,0', "no other quote,1"),
        ('"Hello ""she"" said,0', 'bye ""she"" said",1'),
    ],
)
@pytest.mark.parametrize("between", [0, 1, 8])
def test_rows_between_two_stray_quotes_are_not_swallowed(write: Write, first: str, last: str, between: int) -> None:
    path = write("t.csv", swallowed(first, last, between))
    with pytest.raises(DataError, match=r"line 4 .*line \d+.*data\.table\.quoting"):
        rows(path)
    assert len(rows(path, quoting=False)) == between + 5


@pytest.mark.parametrize(
    "text",
    [
        '"one, two\nthree, four"',
        '"line one\nline two\n\nline four, with a comma\n"',
        '"Dear all,\nthanks,\nbye"',
        '"he said ""yes"",\nshe said ""no"""',
        '"1\n0\n1"',
    ],
)
def test_texts_of_several_lines_are_read(write: Write, text: str) -> None:
    path = write("t.csv", f"text,label\nfirst,1\n{text},0\nlast,1\n")
    found = rows(path)
    assert len(found) == 3
    assert found[1] == (text[1:-1].replace('""', '"'), "0")
    label_first = write("u.csv", f"label,text\n1,first\n0,{text}\n1,last\n")
    assert rows(label_first)[1] == found[1]


def test_lines_that_seem_to_be_rows_are_one_text_if_quoting_is_set(write: Write) -> None:
    path = write("t.csv", 'text,label\nx,1\n"y,1\nz",1\n')
    with pytest.raises(DataError, match="line 3 opens and one in line 4 closes holds what seem to be 1 more rows"):
        rows(path)
    assert rows(path, quoting=True) == [("x", "1"), ("y,1\nz", "1")]
    without_labels = write("u.csv", 'id,text\n1,x\n2,"y\n3,z\n4,w"\n')
    with pytest.raises(DataError, match="opens and one in line 5 closes holds what seem to be 2 more rows"):
        rows(without_labels, ("text",))


@pytest.mark.parametrize("end", ["\n", "\n\n", "\r\n", "\r\r\n"])
@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ("r{0},{1} thing {0},{2}", "id,text,label"),
        ("{1} thing {0},{2}", "text,label"),
        ("{0},{1} thing {0}", "id,text"),  # to predict
        ("{2},{1} thing {0}", "label,text"),
        ("{1} thing {0},{3}", "text,label"),  # a regression
        ("{1} thing {0},{1}", "text,label"),  # words
        ("{1} thing {0},other {1},{2}", "text,text_b,label"),
    ],
)
@pytest.mark.parametrize(("first", "last"), [(3, 7), (2, 11), (5, 6)])
def test_stray_quotes_in_two_of_twelve_rows(
    write: Write, row: str, columns: str, end: str, first: int, last: int
) -> None:
    lines = [row.format(n, "good" if n % 2 else "bad", n % 2, n / 7) for n in range(12)]
    place = row.index("{1} thing")  # where the text begins
    for number in (first, last):
        before = len(row[:place].format(number, "", number % 2, ""))
        after = lines[number].index(f"thing {number}") + len(f"thing {number}")
        line = lines[number]
        lines[number] = f'{line[:before]}"{line[before:]}' if number == first else f'{line[:after]}"{line[after:]}'
    path = write("t.csv", end.join([columns, *lines, ""]))
    with pytest.raises(DataError, match=r"line \d+.*line \d+|row \d+"):
        rows(path, tuple(columns.split(","))[:1])
    assert len(rows(path, tuple(columns.split(",")), quoting=False)) == 12


def test_rows_are_found_before_the_first_piece_ends(write: Write) -> None:
    path = write("t.csv", 'text,label\nx,1\n"y,1\nz",1\nw,0\nv,0\nu,1\n')
    file = DelimitedFile(path, "csv", ("text",), TableConfig())
    with pytest.raises(DataError, match="more rows"):
        next(file.rows(("text",), 3))


def test_line_ends_empty_lines_and_long_fields(write: Write) -> None:
    for end in ("\n", "\r\n", "\r"):
        path = write("t.csv", f'{end}text,label{end}{end}a,1{end}"b{end}c",0{end}{end}d,1')
        assert rows(path) == [("a", "1"), (f"b{end}c", "0"), ("d", "1")]
    long = "word " * 100_000
    assert rows(write("l.csv", f"text,label\n{long},1\n"))[0] == (long, "1")
    assert rows(write("n.csv", "text,label\na\0b,1\n")) == [("a\0b", "1")]
    assert rows(write("w.csv", "text,label\nNA,null\nNone,nan\n")) == [("NA", "null"), ("None", "nan")]


def test_what_was_found_is_said(write: Write) -> None:
    form = DelimitedFile(write("t.csv", b"\xef\xbb\xbftext;label\na;1\n"), "csv", ("text",), TableConfig()).form
    assert form == "semicolon between fields, utf-8"
    form = DelimitedFile(write("t.tsv", 'text\tlabel\n"a\t1\n'), "tsv", ("text",), TableConfig()).form
    assert form == "tab between fields, utf-8, quotes are part of the texts"
    form = DelimitedFile(write("q.tsv", 'text\tlabel\n"a\tb"\t1\n'), "tsv", ("text",), TableConfig()).form
    assert form == "tab between fields, utf-8"
