"""Tables from files: CSV, TSV, JSON, Parquet and data sets of Hugging Face, checked row by row."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning_bge.data.tables.columnar import HFDataset, ParquetFile
from lightning_bge.data.tables.config import TableConfig
from lightning_bge.data.tables.delimited import DelimitedFile
from lightning_bge.data.tables.files import HUB, Files, expand_files, format_of
from lightning_bge.data.tables.json_rows import JSONFile
from lightning_bge.data.tables.rows import LabelColumns, whole_number
from lightning_bge.errors import ConfigError, DataError
from lightning_bge.runtime.log_once import log_once

log = logging.getLogger(__name__)

CHUNK_ROWS = 16384
DEFAULT = TableConfig()
DataFile = DelimitedFile | JSONFile | ParquetFile | HFDataset


@dataclass(frozen=True)
class RowNames:
    """Says which rows a message is about.

    Attributes:
        files: the files that were read one after the other.
        starts: the number of the first row of each, from 0.
    """

    files: tuple[str, ...]
    starts: tuple[int, ...] = (0,)

    def __str__(self) -> str:
        return ", ".join(self.files[:3]) + (f", ... ({len(self.files)} files)" if len(self.files) > 3 else "")

    def rows(self, rows: Sequence[int]) -> str:
        """The first of some rows, numbered from 0 over all files; in the text data rows are numbered from 1 in each."""
        shown = [self._name(row) for row in rows[:5]]
        return f"data row{'s' if len(rows) > 1 else ''} {', '.join(shown)}{', ...' if len(rows) > 5 else ''}"

    def _name(self, row: int) -> str:
        number = max(place for place, start in enumerate(self.starts) if start <= row)
        of = f" of {self.files[number]}" if len(self.files) > 1 else ""
        return f"{row - self.starts[number] + 1}{of}"


@dataclass
class Chunk:
    """Some rows of a file, one after the other.

    Attributes:
        file: the file's name.
        first_row: the number of the first of them in the file, from 0.
        columns: the values of each column that was asked for; None is a missing one.
    """

    file: str
    first_row: int
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


@dataclass
class Table:
    """The requested columns of one or several files.

    Attributes:
        texts: one or two texts for each row.
        labels: a raw label (string, number or list) for each row, a dict where there is one column a label, or None
            where no label column was read.
        groups: a group name for each row, or None where no group column was read.
        names: of the rows, for messages.
    """

    texts: list[tuple[str, ...]]
    labels: list[Any] | None
    groups: list[str] | None
    names: RowNames = field(default_factory=lambda: RowNames(("the file",)))


def open_file(name: str, columns: Sequence[str], config: TableConfig, *, fill: bool = False) -> DataFile:
    """One file that `expand_files` has named, without its rows.

    Args:
        name: its path, or the name of a data set on the hub.
        columns: those that will be read, by which a delimiter is found; none: all.
        config: how files are read.
        fill: whether a field that a row of JSON lacks is a missing value, and no error.

    Raises:
        DataError: it can't be read.
    """
    if name.startswith(HUB):
        return HFDataset(name)
    path = Path(name)
    kind = format_of(path, config)
    if kind == "dataset":
        return HFDataset(name)
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"data file {path} is empty")
    if kind in ("csv", "tsv"):
        return DelimitedFile(path, kind, columns, config)
    if kind in ("json", "jsonl"):
        return JSONFile(path, config, fill)
    return ParquetFile(path)


def log_file_format(name: str, file: DataFile) -> None:
    """Log the form of a file, once."""
    log_once(log, logging.INFO, f"{name}: {file.form}")


def has_pairs(files: Files, config: TableConfig) -> bool:
    """Whether the first file has FlagEmbedding's form, with the columns `PAIR_COLUMNS`."""
    name = expand_files(files)[0]
    if name.startswith(HUB) or format_of(Path(name), config) not in ("json", "jsonl"):
        return False
    return _has_pairs(name, Path(name).stat().st_mtime_ns, config)


@lru_cache(maxsize=64)
def _has_pairs(name: str, changed: int, config: TableConfig) -> bool:
    first = open_file(name, (), config)
    return isinstance(first, JSONFile) and first.has_pairs


def read_chunks(
    files: Files, columns: Sequence[str], config: TableConfig, *, size: int = CHUNK_ROWS
) -> Iterator[Chunk]:
    """The named columns of all rows, in pieces, so that a file of any size needs little memory.

    Args:
        files: see `expand_files`.
        columns: their names.
        config: how files are read.
        size: the most rows of a piece.

    Raises:
        DataError: a file or a column is missing, there are no rows, or a row is malformed.
    """
    for name in expand_files(files):
        file = open_file(name, columns, config)
        log_file_format(name, file)
        row = 0
        for found in file.rows(columns, size):
            yield Chunk(name, row, found)
            row += len(found[columns[0]])
        if not row:
            raise DataError(f"data file {name} has a header but no rows")


def read_table(
    files: Files,
    text_columns: Sequence[str],
    *,
    label_column: str | Sequence[str] | None = None,
    group_column: str | None = None,
    config: TableConfig = DEFAULT,
    max_rows: int | None = None,
) -> Table:
    """Read the named columns of one or several files.

    Args:
        files: a path, a pattern, the name of a data set on the hub, or several of them: see `expand_files`.
        text_columns: one or two column names.
        label_column: its name, several names where each label has a column of its own, or None to read no labels.
        group_column: its name, or None to read no groups.
        config: how files are read.
        max_rows: keep only the first rows. None: all.

    Raises:
        DataError: a file or a column is missing, there are no rows, a row is malformed, a text or group is empty.
        ConfigError: not one or two text columns.
    """
    check_text_columns(text_columns)
    labels = [label_column] if isinstance(label_column, str) else list(label_column or ())
    if both := set(labels) & set(text_columns):
        raise ConfigError(f"data.label_column: {sorted(both)} are in data.text_columns too: name another column")
    names = list(dict.fromkeys([*text_columns, *labels, *filter(None, (group_column,))]))
    columns: dict[str, list[Any]] = {name: [] for name in names}
    starts: dict[str, int] = {}
    for chunk in read_chunks(files, names, config):
        starts.setdefault(chunk.file, len(columns[names[0]]))
        for name in names:
            columns[name] += chunk.columns[name]
        if max_rows is not None and len(columns[names[0]]) >= max_rows:
            columns = {name: values[:max_rows] for name, values in columns.items()}
            break
    rows = RowNames(tuple(starts), tuple(starts.values()))
    texts = [_texts(columns[name], name, rows) for name in text_columns]
    groups = None
    if group_column is not None:
        named = _texts(columns[group_column], group_column, rows, "an empty value")
        groups = [whole_number(name.strip()) for name in named]  # so that a file with 3 and one with 3.0 have one
    raw: list[Any] | None = None
    if isinstance(label_column, str):
        raw = columns[label_column]
    elif labels:
        raw = [
            LabelColumns(zip(labels, values, strict=True))
            for values in zip(*(columns[name] for name in labels), strict=True)
        ]
    return Table(list(zip(*texts, strict=True)), raw, groups, rows)


def check_text_columns(names: Sequence[str]) -> None:
    """Raise `ConfigError` unless these are one or two different columns."""
    if len(names) not in (1, 2) or len(set(names)) < len(names):
        raise ConfigError(f"data.text_columns: expected one or two different columns, got {list(names)}")


def check_label_columns(names: str | Sequence[str]) -> None:
    """Raise `ConfigError` unless this is one column, or two or more different ones, one for each label."""
    if isinstance(names, str):
        return
    twice = [name for name in names if list(names).count(name) > 1]
    if twice:
        raise ConfigError(f"data.label_column: {twice[0]!r} is named twice in {list(names)}. Name each column once")
    if len(names) < 2:
        raise ConfigError(
            f"data.label_column: expected two or more columns, one for each label, got {list(names)}. For one label "
            "set model.task to binary and data.label_column to its name; for a column of lists leave out the brackets"
        )


def has_lone_surrogate(text: str) -> bool:
    """Whether a text has half of a pair of UTF-16 code units, which no encoding can hold."""
    return not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text)


def text_fault(value: Any) -> str | None:
    """Why a value can't be a text, in a few words; None where it can."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return "empty text"
    if not isinstance(value, str | int | float):
        return f"no text but {type(value).__name__}"
    if isinstance(value, str) and has_lone_surrogate(value):
        return "half a surrogate pair, which is no character"
    return None


def _texts(values: list[Any], column: str, names: RowNames, what: str = "empty text") -> list[str]:
    faults = [(row, fault) for row, value in enumerate(values) if (fault := text_fault(value)) is not None]
    if faults:
        first = faults[0][1].replace("empty text", what)
        alike = [row for row, fault in faults if fault == faults[0][1]]
        raise DataError(
            f"{names}: column {column!r} has {first} in {len(alike)} of {len(values)} rows ({names.rows(alike)}): "
            "correct or drop these rows"
        )
    return [str(value) for value in values]
