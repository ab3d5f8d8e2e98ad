"""Rows of CSV and TSV files."""

import csv
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from lightning_bge.data.tables.config import DELIMITERS, TableConfig
from lightning_bge.data.tables.dialect import Dialect, find_delimiter, is_quoted
from lightning_bge.data.tables.files import encoding_of, open_text, reading
from lightning_bge.data.tables.rows import Columns, check_names
from lightning_bge.errors import DataError

NO_DELIMITER = r". In a file of one column the delimiter may be a character that no text has, such as \t"
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
            # empty lines before the header are skipped
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

    def rows(self, names: Sequence[str], chunk: int) -> Iterator[Columns]:
        """The columns of at most `chunk` rows after the other.

        Args:
            names: the columns to read.
            chunk: the most rows of a piece.

        Raises:
            DataError: a row has another number of fields, or a quote is out of place.
        """
        check_names(names, self.columns, self.path, self.form)
        places = [self.columns.index(name) for name in names]
        swallowed = _Swallowed(self.path, self._dialect, len(self.columns))
        records = self._records(swallowed)
        while piece := list(islice(records, chunk)):
            swallowed.check()
            yield {name: [record[place] for record in piece] for name, place in zip(names, places, strict=True)}

    def _records(self, swallowed: "_Swallowed") -> Iterator[list[str]]:
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
                    swallowed.see(start, lines.record, record)
                yield record

    def _width_error(self, number: int, start: int, record: list[str], lines: "_Lines") -> DataError:
        return DataError(
            f"{self.path}: row {number} (line {start}) has {len(record)} fields, expected {len(self.columns)} with "
            f"{self.form}: {_shown(lines.record[0])}. Correct the row, or set data.table.delimiter or "
            f"data.table.quoting{NO_DELIMITER if len(self.columns) == 1 else ''}"
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
            with reading(self.path, self._encoding):
                yield
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

    The lines of such a field are rows of their own: they have as many fields, and one of their other columns has values
    like those of other rows. A text of several lines has neither, but by chance.
    """

    def __init__(self, path: Path, dialect: Dialect, columns: int) -> None:
        self._path = path
        self._literal = Dialect(dialect.delimiter, quoting=False)
        self._seen = [_Values() for _ in range(columns)]
        self._suspects: list[tuple[int, int, dict[int, list[str]]]] = []  # first and last line, values by column

    def see(self, start: int, lines: list[str], record: list[str]) -> None:
        """See a record, which begins at a line."""
        for values, value in zip(self._seen, record, strict=True):
            values.add(value)
        if len(lines) == 1:
            return
        rows = [row for row in self._literal.reader(lines) if row]
        whole = [(number, row) for number, row in enumerate(rows) if len(row) == len(record)]
        if len(record) < 2 or len(whole) < max(2, 0.8 * len(rows)):
            return
        text = next(column for column, value in enumerate(record) if "\n" in value or "\r" in value)
        # the columns before the text are the record's own in the first line, and those behind it in the last one
        others = {
            column: [row[column] for number, row in whole if number != (0 if column < text else len(rows) - 1)]
            for column in range(len(record))
            if column != text
        }
        self._suspects.append((start, start + len(lines) - 1, others))

    def check(self) -> None:
        """Raise `DataError` if rows were swallowed, as far as the records tell that have been seen."""
        for first, last, others in self._suspects:
            for column, values in others.items():
                if values and self._seen[column].are_like(values):
                    raise DataError(
                        f"{self._path}: a text that a quote in line {first} opens and one in line {last} closes holds "
                        f"what seem to be {len(values)} more rows. Close the quotes, or set data.table.quoting: false "
                        "where quotes are part of the texts, true where this is one text"
                    )


class _Values:
    """What the values of a column are like: those of the first rows, and their shapes."""

    _ROWS = 5000  # enough to know a column, and few enough to cost no time

    def __init__(self) -> None:
        self._rows, self._values, self._shapes = 0, set[str](), set[str]()

    def add(self, value: str) -> None:
        if self._rows < self._ROWS:
            self._rows += 1
            self._values.add(value)
            self._shapes.add(_shape(value))

    def are_like(self, values: list[str]) -> bool:
        """Whether some values could be of this column: single words of a text may be by chance, numbers hardly."""
        shapes = [_shape(value) for value in values]
        if len(values) > 1 and self._shapes.issuperset(shapes):
            return True
        pairs = zip(values, shapes, strict=True)
        return all(value in self._values or ("9" in shape and shape in self._shapes) for value, shape in pairs)


def _shape(value: str) -> str:
    """A value with runs of digits as 9 and runs of letters as a, such as `a-9` for `row-17`."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "9", value[:100]))


def _shown(line: str) -> str:
    line = line.rstrip("\r\n")
    return repr(line if len(line) <= _SHOWN else f"{line[:_SHOWN]}...")
