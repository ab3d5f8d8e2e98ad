"""Which delimiter and quotes a CSV or TSV file has."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from lightning_bge.data.tables.config import DELIMITERS, TableConfig


@dataclass(frozen=True)
class Dialect:
    """The form of a CSV or TSV file.

    Attributes:
        delimiter: one character.
        quoting: whether a double quote encloses a field.
        escape: the character before a quote in an enclosed field; None: a quote is doubled.
    """

    delimiter: str
    quoting: bool
    escape: str | None = None

    def reader(self, lines: Iterable[str]) -> Iterator[list[str]]:
        """The records of lines that keep their ends; raises `csv.Error` for a quote that is out of place.

        Python's reader, as it alone has a mode that reports such quotes: those of Arrow and pandas read an unclosed
        quote, or text behind a closed one, as text, and swallow the rows up to the next quote.
        """
        if not self.quoting:
            return csv.reader(lines, delimiter=self.delimiter, quoting=csv.QUOTE_NONE, strict=True)
        return csv.reader(
            lines, delimiter=self.delimiter, strict=True, escapechar=self.escape, doublequote=self.escape is None
        )


def find_delimiter(line: str, names: Sequence[str], default: str, config: TableConfig) -> str:
    """The delimiter with which the first line of a file has the columns that are asked for.

    Args:
        line: the first line.
        names: the columns; none: as many columns as possible.
        default: of the format: it is preferred, and taken where no delimiter gives these columns.
        config: whether a delimiter is set.
    """
    if config.delimiter is not None:
        return config.delimiter
    columns = {delimiter: _split(line, delimiter, config) for delimiter in (default, *DELIMITERS)}
    if names:
        fitting = [delimiter for delimiter, found in columns.items() if set(names) <= set(found)]
        return fitting[0] if fitting else max(columns, key=lambda delimiter: len(columns[delimiter]))
    return default if len(columns[default]) > 1 else max(columns, key=lambda delimiter: len(columns[delimiter]))


def _split(line: str, delimiter: str, config: TableConfig) -> list[str]:
    try:
        return next(Dialect(delimiter, config.quoting is not False, config.escape).reader([line]), [])
    except csv.Error:
        return line.rstrip("\r\n").split(delimiter)


def is_quoted(lines: Iterable[str], dialect: Dialect) -> bool:
    """Whether the quotes of a file enclose fields: those that a program would have written for these fields.

    It writes them around the fields that need it, around all fields, or around all that are no numbers.

    Args:
        lines: the file's, with their ends.
        dialect: its delimiter.
    """
    record: list[str] = []

    def recorded() -> Iterator[str]:
        for line in lines:
            record.append(line)
            yield line

    styles = {csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC}
    found = False
    try:
        for fields in replace(dialect, quoting=True).reader(recorded()):
            raw = "".join(record).rstrip("\r\n")
            record.clear()
            found = found or '"' in raw
            if '"' in raw or styles != {csv.QUOTE_MINIMAL}:
                styles = {style for style in styles if raw == _written(fields, dialect, style)}
            if not styles:
                return False
    except csv.Error:
        return False
    return found


def _written(fields: list[str], dialect: Dialect, style: int) -> str:
    text = io.StringIO()
    values: list[object] = [_as_number(field) for field in fields] if style == csv.QUOTE_NONNUMERIC else list(fields)
    csv.writer(text, delimiter=dialect.delimiter, quoting=style, lineterminator="\r\n").writerow(values)  # type: ignore[arg-type]
    return text.getvalue().removesuffix("\r\n")


class _Number(float):
    """A number that is written as it was read."""

    text: str

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


def _as_number(field: str) -> object:
    try:
        number = _Number(field)
    except ValueError:
        return field
    number.text = field
    return number
