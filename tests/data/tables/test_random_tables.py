"""Tables of random content in every format: what is read is what was written, or an error names the row."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st

from lightning_bge.data.tables.config import TableConfig
from lightning_bge.data.tables.readers import read_chunks
from lightning_bge.errors import DataError

EXAMPLES = 2000
WORDS = ["NA", "null", "None", "nan", "", " ", "0", "1", "1.0", "True", "#", "a b", '"', '""', "'", "x\\", "-"]
WORDS += ["é", "日本", "😀"]
PIECES = st.sampled_from([*WORDS, *",;\t|\n", "\r\n", "word", 'said "yes"', "end."])
CELLS = st.one_of(st.sampled_from(WORDS), st.lists(PIECES, max_size=5).map("".join), st.text(max_size=12))
NAMES = st.one_of(
    st.sampled_from(["text", "label", "id", "text_a", "a,b", "ü"]), st.text("abcXYZ_ ;", min_size=1, max_size=6)
)


@dataclass(frozen=True)
class Form:
    """How a table is written."""

    kind: str
    delimiter: str = ","
    quoting: int = csv.QUOTE_MINIMAL
    encoding: str = "utf-8"
    line_end: str = "\n"
    compression: str = ""

    @property
    def name(self) -> str:
        return f"table.{self.kind}{self.compression if self.kind != 'parquet' else ''}"

    @property
    def config(self) -> TableConfig:
        """The options that say all of it."""
        if self.kind not in ("csv", "tsv"):
            return TableConfig(encoding=self.encoding)
        quoting = self.quoting != csv.QUOTE_NONE
        return TableConfig(delimiter=self.delimiter, encoding=self.encoding, quoting=quoting)


FORMS = st.builds(
    Form,
    st.sampled_from(["csv", "csv", "tsv", "tsv", "json", "jsonl", "parquet"]),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC, csv.QUOTE_NONE]),
    st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "cp1252", "shift_jis"]),
    st.sampled_from(["\n", "\n", "\r\n", "\r"]),
    st.sampled_from(["", "", ".gz", ".bz2", ".zst"]),
)


VALUES = st.one_of(CELLS, st.none())
TYPED = [VALUES, st.one_of(st.integers(-(2**40), 2**40), st.none()), st.booleans(), st.one_of(st.floats(), st.none())]


@st.composite
def tables(draw: st.DrawFn, form: Form) -> dict[str, list[Any]]:
    """Texts alone in CSV and TSV; values of a type for each column, some of them missing, elsewhere."""
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    rows = draw(st.integers(1, 6))
    kinds = [CELLS] if form.kind in ("csv", "tsv") else TYPED
    return {name: draw(st.lists(draw(st.sampled_from(kinds)), min_size=rows, max_size=rows)) for name in names}


def content_of(table: dict[str, list[Any]], form: Form) -> bytes:
    if form.kind == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(table), sink)
        return sink.getvalue().to_pybytes()
    if form.kind in ("csv", "tsv"):
        if form.quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
            breaks = set("\r\n") - (set(form.line_end) if form.quoting == csv.QUOTE_MINIMAL else set())
            if any(char in cell for cells in table.values() for cell in cells for char in breaks):
                raise csv.Error("the writer does not enclose this line end")
        options: dict[str, Any] = {"sep": form.delimiter, "quoting": form.quoting, "lineterminator": form.line_end}
        text = pd.DataFrame(table).to_csv(index=False, **options)
        return text.encode(form.encoding)
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    text = json.dumps(rows) if form.kind == "json" else form.line_end.join(map(json.dumps, rows))
    return text.encode(form.encoding)


PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": lambda b: pa.compress(b, "zstd", asbytes=True)}


def means_something_else(content: bytes, form: Form) -> bool:
    """Whether the file is, without options, one of another content: nothing in it says what its writer meant."""
    if form.encoding in ("cp1252", "shift_jis"):
        try:
            return content.decode() != content.decode(form.encoding)
        except UnicodeError:
            return False
    return form.kind in ("csv", "tsv") and form.quoting == csv.QUOTE_NONE and '"'.encode(form.encoding)[-1:] in content


def expected(table: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """NaN is a missing value."""
    return {name: [None if value != value else value for value in values] for name, values in table.items()}


def read(path: Path, names: list[str], config: TableConfig) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {name: [] for name in names}
    for chunk in read_chunks(path, names, config, size=3):
        for name in names:
            found[name] += chunk.columns[name]
    return found


def pandas_reads(content: bytes, table: dict[str, list[Any]], form: Form) -> bool:
    """Whether pandas reads back what was written, with all options given."""
    try:
        found = pd.read_csv(
            io.BytesIO(content),
            sep=form.delimiter,
            quoting=form.quoting,  # type: ignore[arg-type]
            encoding=form.encoding,
            dtype=str,
            keep_default_na=False,
            skip_blank_lines=len(table) > 1,
        )
    except (ValueError, UnicodeError, pd.errors.ParserError):
        return False
    return found.to_dict("list") == table


@seed(0)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.data(), FORMS)
def _check(counts: Counter[str], folder: Path, data: st.DataObject, form: Form) -> None:
    table = data.draw(tables(form))
    try:
        content = content_of(table, form)
    except (UnicodeError, csv.Error):  # the encoding lacks a character, or a field needs quotes
        assume(False)
    path = folder / form.name
    path.write_bytes(PACK[form.compression if form.kind != "parquet" else ""](content))
    names = list(table)
    counts["examples"] += 1
    by_pandas = form.kind in ("csv", "tsv") and pandas_reads(content, table, form)
    for which, config in (("all options", form.config), ("no option", TableConfig())):
        if which == "no option" and means_something_else(content, form):
            continue
        try:
            found = read(path, names, config)
        except DataError as error:
            if str(path) not in str(error) or not re.search(r"(row|line) \d+|no column|not valid UTF", str(error)):
                raise
            counts[f"{which}: refused"] += 1
            counts[f"{which}: refused, and pandas reads it"] += by_pandas
            continue
        assert found == expected(table), (which, form, content)
        counts[f"{which}: read"] += 1
        counts[f"{which}: read, and by pandas"] += by_pandas


def test_random_tables_are_read_as_they_were_written_or_refused(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    _check(counts, tmp_path)
    of_pandas = counts["all options: refused, and pandas reads it"] + counts["all options: read, and by pandas"]
    assert counts["examples"] >= EXAMPLES
    assert of_pandas > EXAMPLES / 4  # else the figure below says little
    assert counts["all options: read, and by pandas"] >= 0.95 * of_pandas
    assert counts["all options: read"] > 0.95 * EXAMPLES
    assert counts["no option: read"] > 0.8 * EXAMPLES
