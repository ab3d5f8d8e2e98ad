"""Rows of CSV and TSV files."""

import csv
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from lightning_bge.data.tables.config import DELIMITERS, TableConfig
from lightning_bge.data.tables.dialect import Dialect, find_delimiter, is_quoted
from lightning_bge.data.tables.files import encoding_of, open_text, undecodable
from lightning_bge.data.tables.rows import Rows, check_names
from lightning_bge.errors import DataError

log = logging.getLogger(__name__)

_SHOWN = 60  # characters of a line in a message


class DelimitedFile:
    """A CSV or TSV file whose first line names its columns.

    Args:
        path: the file.
        kind: csv or tsv.
        names: the columns that will be read, by which the delimiter is found; none: all.
        config: delimiter, encoding and quotes, as far as they are set.

    Attributes:
        columns: the names in the first line.
        form: what was found, for a message.

    Raises:
        DataError: the file is empty, or its first line can't be read.
    """

    def __init__(self, path: Path, kind: str, names: Sequence[str], config: TableConfig) -> None:
        self.path, self._config = path, config
        self._encoding = encoding_of(path, config)
        with self._errors(), open_text(path, self._encoding) as file:
            # an empty line before the header is none
            first = next((line for line in file if line.strip()), "")
            if not first:
                raise DataError(f"data file {path} is empty: its first line must name the columns")
            delimiter = find_delimiter(first, names, "," if kind == "csv" else "\t", config)
        self._dialect = Dialect(delimiter, self._quoting(kind, delimiter), config.escape)
        with self._errors(), open_text(path, self._encoding) as file:
            self.columns = next(filter(None, self._dialect.reader(file)), [])
        self.form = (
            f"{DELIMITERS.get(delimiter, repr(delimiter))} between fields, {self._encoding.removesuffix('-sig')}"
        )
        self.form += "" if self._dialect.quoting else ", quotes are part of the texts"

    def _quoting(self, kind: str, delimiter: str) -> bool:
        if self._config.quoting is not None:
            return self._config.quoting
        if kind == "csv" or self._config.escape is not None:
            return True
        with self._errors(), open_text(self.path, self._encoding) as file:
            return is_quoted(file, Dialect(delimiter, quoting=True))

    def rows(self, names: Sequence[str], label: str | None, chunk: int) -> Iterator[Rows]:
        """The rows in pieces of at most `chunk`.

        Args:
            names: the columns to read.
            label: the one of them that holds labels, by which a swallowed row is known; None: there is none.
            chunk: the most rows of a piece.

        Raises:
            DataError: a row has another number of fields, or a quote is out of place.
        """
        check_names(names, self.columns, self.path, self.form)
        places = [self.columns.index(name) for name in names]
        records = self._records(None if label is None else self.columns.index(label))
        while piece := list(islice(records, chunk)):
            yield Rows({name: [record[place] for record in piece] for name, place in zip(names, places, strict=True)})

    def _records(self, label: int | None) -> Iterator[list[str]]:
        swallowed = _Swallowed(self.path, self._dialect, len(self.columns), label)
        with self._errors(), open_text(self.path, self._encoding) as file:
            lines = _Lines(file)
            reader = self._dialect.reader(lines)
            header, number = False, 0
            while True:
                start = lines.count + 1
                lines.record.clear()
                try:
                    record = next(reader, None)
                except csv.Error as error:
                    raise self._quote_error(start, lines, error) from error
                if record is None:
                    break
                # in a file of one column an empty line is an empty text, which has to be reported
                if not header or (not record and len(self.columns) > 1):
                    header = header or bool(record)
                    continue
                number += 1
                record = record or [""]
                if len(record) != len(self.columns):
                    raise self._width_error(number, start, record, lines)
                if self._config.quoting is None:
                    swallowed.check(start, lines, record)
                yield record
        swallowed.finish()

    def _width_error(self, number: int, start: int, record: list[str], lines: "_Lines") -> DataError:
        return DataError(
            f"{self.path}: row {number} (line {start}) has {len(record)} fields, expected {len(self.columns)} with "
            f"{self.form}: {_shown(lines.record[0])}. Correct the row, or set data.table.delimiter or "
            "data.table.quoting"
        )

    def _quote_error(self, start: int, lines: "_Lines", error: csv.Error) -> DataError:
        if start == lines.count:
            place = f"line {start} has a quote that is not closed, or text behind a closed one"
        else:
            place = f"a quote that line {start} opens is not closed up to line {lines.count}, or text follows it there"
        return DataError(
            f"{self.path}: {place}: {_shown(lines.record[0])}. Correct it (a quote in a quoted text is doubled), "
            "or set data.table.quoting to false where quotes are part of the texts, or data.table.escape to \\ where "
            f"one stands before each ({error})"
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        before = csv.field_size_limit(sys.maxsize)  # a text may be longer than 128 KiB
        try:
            yield
        except UnicodeError as error:
            raise undecodable(self.path, self._encoding, error) from error
        except OSError as error:
            raise DataError(f"data file {self.path} can't be read: {error}") from error
        finally:
            csv.field_size_limit(before)


class _Lines:
    """The lines of a file; `record` has those since it was cleared last."""

    def __init__(self, file: Iterator[str]) -> None:
        self._file, self.count, self.record = file, 0, list[str]()

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._file)
        self.count += 1
        self.record.append(line)
        return line


class _Swallowed:
    """Finds rows that stand within a field, since two quotes that have nothing to do with each other enclose them.

    Each line of such a field is a row of its own: with as many fields, and with a label that other rows have.
    """

    def __init__(self, path: Path, dialect: Dialect, columns: int, label: int | None) -> None:
        self._path, self._columns, self._label = path, columns, label
        self._literal = Dialect(dialect.delimiter, quoting=False)
        self._labels: set[str] = set()
        self._suspects: list[tuple[int, int, set[str]]] = []  # first and last line, and the labels between

    def check(self, start: int, lines: _Lines, record: list[str]) -> None:
        """See a record, which begins at a line."""
        if self._label is not None:
            self._labels.add(record[self._label])
        if len(lines.record) == 1:
            return
        rows = list(self._literal.reader(lines.record))
        if self._columns < 2 or any(len(row) != self._columns for row in rows):
            return
        if self._label is not None:
            self._suspects.append((start, lines.count, {row[self._label] for row in rows[:-1]}))
        elif len(rows) > 2:  # a text of two lines can have as many fields by chance
            raise self._error(start, lines.count)

    def finish(self) -> None:
        """Raise `DataError` if rows were swallowed."""
        for first, last, labels in self._suspects:
            if labels <= self._labels:
                raise self._error(first, last)

    def _error(self, first: int, last: int) -> DataError:
        return DataError(
            f"{self._path}: a text that a quote in line {first} opens and one in line {last} closes holds "
            f"{last - first} whole rows. Close the quotes, or set data.table.quoting: false where quotes are part of "
            "the texts, true where this is one text"
        )


def _shown(line: str) -> str:
    line = line.rstrip("\r\n")
    return repr(line if len(line) <= _SHOWN else f"{line[:_SHOWN]}...")
