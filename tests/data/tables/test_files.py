from __future__ import annotations

import bz2
import gzip
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from lightning_bge.data.tables.config import TableConfig
from lightning_bge.data.tables.files import HubDataset, encoding_of, expand_files, format_of
from lightning_bge.data.tables.readers import read_table
from lightning_bge.errors import ConfigError, DataError

Write = Callable[[str, "str | bytes"], Path]
TEXT = "text,label\nan é,1\nb,0\n"


def test_names_patterns_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.csv", "a.csv", "c.tsv", "[x].csv"):
        (tmp_path / name).write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    assert expand_files("a.csv") == ["a.csv"]
    assert expand_files("?.csv") == ["a.csv", "b.csv"]
    assert expand_files(["c.tsv", "?.csv"]) == ["c.tsv", "a.csv", "b.csv"]
    assert expand_files("[x].csv") == ["[x].csv"]  # a file of that name, and no pattern
    assert expand_files("hf://owner/name") == ["hf://owner/name"]
    for wrong, message in (
        ("no.csv", "does not exist"),
        ("n*.csv", "no file"),
        ("n" * 300, "can't be the name of a file"),
        (["a.csv", "./a.csv"], "named twice"),
        (["a.csv", str(tmp_path / "a.csv")], "named twice"),
        (["a.csv", "?.csv"], "twice"),
        ([], "empty list"),
    ):
        with pytest.raises(DataError, match=message):
            expand_files(wrong)


def test_several_files_are_one_table_and_errors_name_the_file(write: Write) -> None:
    first, second = write("a.csv", TEXT), write("b.jsonl", '{"text": "c", "label": 1}\n{"text": "", "label": 1}\n')
    both = [str(first), str(second)]
    table = read_table(first, ("text",), label_column="label")
    assert (table.texts, table.labels) == ([("an é",), ("b",)], ["1", "0"])
    with pytest.raises(DataError, match=rf"empty text in 1 of 4 rows \(data row 2 of {second}"):
        read_table(both, ("text",), label_column="label")
    second.write_text('{"text": "c", "label": 1.0}\n')
    table = read_table(both, ("text",), label_column="label")
    assert (table.texts, table.labels) == ([("an é",), ("b",), ("c",)], ["1", "0", 1.0])
    assert table.names.rows([1, 2]) == f"data rows 2 of {first}, 1 of {second}"


@pytest.mark.parametrize(
    ("ending", "pack"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".zst", lambda content: pa.compress(content, "zstd", asbytes=True)),
    ],
)
def test_compressed_files(write: Write, ending: str, pack: Callable[[bytes], bytes]) -> None:
    content = pack(TEXT.encode())
    table = read_table(write(f"t.csv{ending}", content), ("text",), label_column="label")
    assert table.texts == [("an é",), ("b",)]
    for wrong in (content[:-6], TEXT.encode()):
        with pytest.raises(DataError, match="can't be read"):
            read_table(write(f"w.csv{ending}", wrong), ("text",))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_unicode_is_found(write: Write, encoding: str) -> None:
    path = write("t.csv", TEXT.encode(encoding))
    assert encoding_of(path, TableConfig()) == encoding
    assert read_table(path, ("text",)).texts == [("an é",), ("b",)]


def test_another_encoding_is_refused_with_proposals_and_read_if_it_is_set(write: Write) -> None:
    path = write("t.csv", TEXT.encode("cp1252"))
    with pytest.raises(DataError, match=r"line 2 is not valid UTF-8; as cp1252: 'an é,1'.*data\.table\.encoding"):
        read_table(path, ("text",))
    assert read_table(path, ("text",), config=TableConfig(encoding="cp1252")).texts[0] == ("an é",)
    with pytest.raises(DataError, match=r"not valid UTF-16|no column"):
        read_table(path, ("text",), config=TableConfig(encoding="utf-16"))
    with pytest.raises(DataError, match="line 2 is not valid UTF-8"):
        read_table(write("t.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n'), ("text",))
    with pytest.raises(DataError, match=r"line 3 is not valid UTF-16\. Set data\.table\.encoding"):
        read_table(write("u.csv", TEXT.encode("utf-16")[:-1]), ("text",))
    for wrong in ("utf9", "base64"):
        with pytest.raises(ConfigError, match=r"data\.table\.encoding: expected the name of a text encoding"):
            TableConfig(encoding=wrong)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(TEXT.encode(), mtime=0), r"compressed with gzip: add \.gz"),
        (bz2.compress(TEXT.encode()), r"compressed with bzip2: add \.bz2"),
        (pa.compress(TEXT.encode(), "zstd", asbytes=True), r"compressed with Zstandard: add \.zst"),
        (b"PK\x03\x04 and more", "zip archive or an Excel file"),
        (b"PAR1 and more", "Parquet file: name it .parquet"),
    ],
    ids=["gzip", "bzip2", "zstd", "zip", "parquet"],
)
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.json"])
def test_what_is_no_text_is_named(write: Write, content: bytes, words: str, name: str) -> None:
    with pytest.raises(DataError, match=words):
        read_table(write(name, content), ("text",))


def test_formats_and_names_of_the_hub(tmp_path: Path) -> None:
    for name, kind in (("a.CSV", "csv"), ("a.txt.gz", "tsv"), ("a.json.zst", "json"), ("a.b.parquet", "parquet")):
        assert format_of(tmp_path / name, TableConfig()) == kind
    assert format_of(tmp_path / "a.dat", TableConfig(format="jsonl")) == "jsonl"
    for wrong in ("a.xlsx", "a.gz", "a"):
        with pytest.raises(DataError, match=r"unknown ending; known are \.csv"):
            format_of(tmp_path / wrong, TableConfig())
    with pytest.raises(DataError, match="is a folder"):
        format_of(tmp_path, TableConfig())
    assert HubDataset.parse("hf://nyu-mll/glue/rte@main:train[:10%]") == HubDataset(
        "nyu-mll/glue", "rte", "main", "train[:10%]"
    )
    assert HubDataset.parse("hf://owner/name") == HubDataset("owner/name", None, None, "train")
    with pytest.raises(DataError, match="expected hf://owner/name"):
        HubDataset.parse("hf://name")
