"""Rows from files: CSV, TSV, JSON lines and Parquet, read with Arrow and checked."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from lightning_bge.errors import ConfigError, DataError

Format = Literal["auto", "csv", "tsv", "jsonl", "parquet"]

ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
# A row may not be longer than a block; the default of 1 MiB is too little for long documents.
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class TableConfig:
    """How files are read.

    Args:
        format: file format; auto: by the ending (.csv, .tsv and .txt, .jsonl, .json and .ndjson, .parquet).
        quoting: whether a double quote encloses a field of CSV or TSV. Unset: CSV yes, TSV no, because the TSV files
            of public data sets contain unpaired quotes.
        max_rows: read only the first rows of the training file, for a quick trial. Unset: all rows.
        labels: label names in the order of the model's outputs (binary: the negative one first). Unset: found in the
            training file and sorted. In YAML, quote names that it reads as booleans or numbers: '["no", "yes"]'.
        label_separator: separates several labels in one cell (multi-label tasks).
    """

    format: Format = "auto"
    quoting: bool | None = None
    max_rows: int | None = None
    labels: tuple[str, ...] | None = None
    label_separator: str = "|"

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise ConfigError(f"data.table.format must be one of {', '.join(get_args(Format))}, got {self.format!r}")
        if self.max_rows is not None and self.max_rows < 1:
            raise ConfigError(f"data.table.max_rows must be at least 1 or unset, got {self.max_rows}")
        if not self.label_separator:
            raise ConfigError("data.table.label_separator must not be empty; the default is |")
        if self.labels is not None:
            # Lists come from YAML; a tuple makes the configuration hashable.
            object.__setattr__(self, "labels", tuple(str(name) for name in self.labels))


@dataclass
class Table:
    """The requested columns of a file.

    Attributes:
        texts: one or two texts for each row.
        labels: a raw label (string, number or list) for each row, or None where no label column was read.
        groups: a group name for each row, or None where no group column was read.
    """

    texts: list[tuple[str, ...]]
    labels: list[Any] | None
    groups: list[str] | None


def read_table(
    path: str | Path,
    text_columns: Sequence[str],
    *,
    label_column: str | None = None,
    group_column: str | None = None,
    config: TableConfig = TableConfig(),
    max_rows: int | None = None,
) -> Table:
    """Read the named columns of a file.

    Args:
        path: the file; `~` is expanded.
        text_columns: one or two column names.
        label_column: its name, or None to read no labels.
        group_column: its name, or None to read no groups.
        config: format and quoting.
        max_rows: keep only the first rows. None: all.

    Raises:
        DataError: the file or a column is missing, there are no rows, a row is malformed, a text or group is empty.
        ConfigError: not one or two text columns.
    """
    path = Path(path).expanduser()
    if len(text_columns) not in (1, 2):
        raise ConfigError(f"text_columns must name one or two columns, got {list(text_columns)}")
    if not path.is_file():
        raise DataError(f"data file {path} does not exist{' (it is a folder)' if path.is_dir() else ''}")
    if path.stat().st_size == 0:
        raise DataError(f"data file {path} is empty")
    names = [*text_columns, *filter(None, (label_column, group_column))]
    columns = _read_columns(path, list(dict.fromkeys(names)), config)
    columns = {name: values[:max_rows] for name, values in columns.items()}
    if not columns[text_columns[0]]:
        raise DataError(f"data file {path} has a header but no rows")
    texts = [_texts(columns[name], name, path) for name in text_columns]
    groups = _texts(columns[group_column], group_column, path) if group_column else None
    labels = columns[label_column] if label_column else None
    return Table(list(zip(*texts, strict=True)), labels, groups)


def first_rows(rows: Sequence[int]) -> str:
    """The first of some 0-based row numbers, counted from 1, for an error message."""
    shown = ", ".join(str(row + 1) for row in rows[:5])
    return f"row{'s' if len(rows) > 1 else ''} {shown}{', ...' if len(rows) > 5 else ''}"


def _texts(values: list[Any], column: str, path: Path) -> list[str]:
    empty = [row for row, value in enumerate(values) if value is None or (isinstance(value, str) and not value.strip())]
    if empty:
        raise DataError(
            f"{path}: column {column!r} is empty in {len(empty)} of {len(values)} rows ({first_rows(empty)}, "
            "the first data row is 1): fill in or drop these rows"
        )
    wrong = [row for row, value in enumerate(values) if not isinstance(value, str | int | float)]
    if wrong:
        kind = type(values[wrong[0]]).__name__
        raise DataError(f"{path}: column {column!r} must hold text, {first_rows(wrong)} holds a {kind}")
    return [str(value) for value in values]


def _read_columns(path: Path, names: list[str], config: TableConfig) -> dict[str, list[Any]]:
    kind = config.format if config.format != "auto" else ENDINGS.get(path.suffix.lower())
    if kind is None:
        raise DataError(
            f"data file {path} has an unknown ending; known are {', '.join(ENDINGS)}. "
            "Rename it, or set data.table.format to csv, tsv, jsonl or parquet"
        )
    try:
        if kind == "jsonl":
            return _read_jsonl(path, names)
        if kind == "parquet":
            return _read_parquet(path, names)
        quoting = kind == "csv" if config.quoting is None else config.quoting
        return _read_delimited(path, names, "," if kind == "csv" else "\t", quoting)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        _check_utf8(path, kind)
        raise DataError(f"data file {path} cannot be read as {kind}: {error}") from error


def _check_names(names: list[str], known: Sequence[str], path: Path) -> None:
    missing = [name for name in names if name not in known]
    if missing:
        raise DataError(
            f"data file {path} has no column {', '.join(map(repr, missing))}; its columns are "
            f"{', '.join(map(repr, known))}. Set text_columns, label_column or group_column"
        )
    twice = [name for name in names if list(known).count(name) > 1]
    if twice:
        raise DataError(f"data file {path} has more than one column {twice[0]!r}: rename one of them")


def _read_delimited(path: Path, names: list[str], delimiter: str, quoting: bool) -> dict[str, list[Any]]:
    invalid: list[Any] = []

    def on_invalid(row: Any) -> str:
        invalid.append(row)
        return "error"

    # One thread: only then does Arrow know the number of a malformed row.
    read = pacsv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES)
    parse = pacsv.ParseOptions(
        delimiter=delimiter,
        quote_char='"' if quoting else False,
        newlines_in_values=quoting,
        invalid_row_handler=on_invalid,
    )
    if quoting:
        _check_quotes(path, delimiter)
    try:
        header = pacsv.open_csv(path, read, parse).schema.names
        _check_names(names, header, path)
        # In a file of one column an empty line is an empty text, which has to be reported.
        parse.ignore_empty_lines = len(header) > 1
        convert = pacsv.ConvertOptions(
            include_columns=names,
            column_types={name: pa.string() for name in names},
            strings_can_be_null=False,
        )
        return pacsv.read_csv(path, read, parse, convert).to_pydict()
    except pa.ArrowInvalid as error:
        if not invalid:
            raise
        row = invalid[0]
        number = "a row" if row.number is None else f"row {row.number - 1}"
        raise DataError(
            f"{path}: {number} (the first data row is 1) has {row.actual_columns} columns, "
            f"expected {row.expected_columns}: {row.text[:80]!r}. Fix the row, or set data.table.quoting"
        ) from error


def _check_quotes(path: Path, delimiter: str) -> None:
    """Arrow silently reads an unclosed quote as text up to the end of the file; Python's reader reports it."""
    if path.read_bytes().count(b'"') % 2 == 0:
        return
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        start = 1
        try:
            for _ in reader:
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}: the row that starts at line {start} has a quote that is not closed ({error}). "
                "Close it, or set data.table.quoting to false where quotes are part of the text"
            ) from error


def _check_utf8(path: Path, kind: str) -> None:
    if kind == "parquet":
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: line {number} is not valid UTF-8 ({error}). Save it as UTF-8") from error


def _read_jsonl(path: Path, names: list[str]) -> dict[str, list[Any]]:
    """Python's parser, not Arrow's: it names the line of an error and takes cells of different types."""
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}: line {number} is not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}: line {number} must hold one JSON object, got {type(row).__name__}")
            rows.append(row)
            numbers.append(number)
    if not rows:
        raise DataError(f"data file {path} has no rows")
    _check_names(names, list(dict.fromkeys(key for row in rows for key in row)), path)
    for number, row in zip(numbers, rows, strict=True):
        absent = [name for name in names if name not in row]
        if absent:
            raise DataError(f"{path}: line {number} has no {absent[0]!r}; it has {', '.join(map(repr, row))}")
    return {name: [row[name] for row in rows] for name in names}


def _read_parquet(path: Path, names: list[str]) -> dict[str, list[Any]]:
    file = pq.ParquetFile(path)
    _check_names(names, file.schema_arrow.names, path)
    return file.read(columns=names).to_pydict()
