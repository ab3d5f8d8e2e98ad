"""Rows of JSON files: an object a line, or an array of objects; also a query and its texts, as in FlagEmbedding."""

import json
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from lightning_bge.data.tables.config import TableConfig
from lightning_bge.data.tables.files import encoding_of, open_text, reading
from lightning_bge.data.tables.rows import Columns, check_names
from lightning_bge.errors import DataError

PAIR_COLUMNS = ("query", "passage", "label")  # of the rows that are made of FlagEmbedding's lines

_LISTS = {"pos": 1, "neg": 0}  # of texts in these lines, with the labels of their rows

_Object = tuple[str, dict[str, Any]]  # where it stands, and its fields


class JSONFile:
    """A JSON file of objects, which are rows.

    A line `{"query": ..., "pos": [...], "neg": [...]}`, as FlagEmbedding reads it, is one row for each text of `pos`
    and `neg`, with the columns `query`, `passage` and `label` (1 and 0), and the line's other fields.

    Args:
        path: the file.
        config: the encoding, if it is set.
        fill: whether a field that a row lacks is a missing value, and no error.

    Attributes:
        form: what was found, for a message.
        has_pairs: whether it has FlagEmbedding's form.

    Raises:
        DataError: it holds no objects.
    """

    def __init__(self, path: Path, config: TableConfig, fill: bool = False) -> None:
        self.path, self._encoding, self._fill = path, encoding_of(path, config), fill
        with reading(self.path, self._encoding), open_text(path, self._encoding) as file:
            first = next((line.strip() for line in file if line.strip()), "")
        self._array = first.startswith("[")
        self._values: list[Any] | None = None  # of an array, which is parsed as a whole
        objects = self._objects()
        start = next(objects, None)
        if start is None:
            raise DataError(f"data file {path} has no rows")
        self.has_pairs = _is_pair(start[1])
        if not self._array and not self.has_pairs and next(objects, None) is None:
            self._check_is_row(start[1])
        form = "one array" if self._array else "one object a line"
        self.form = f"{form}, {self._encoding.removesuffix('-sig')}"
        self.form += ", texts for queries" if self.has_pairs else ""

    def _check_is_row(self, content: dict[str, Any]) -> None:
        """Refuse a file of one object that holds columns, or rows by their names, and is no row itself."""
        values = list(content.values())
        columns = all(isinstance(value, list) for value in values) or all(isinstance(value, dict) for value in values)
        rows = [
            name
            for name, value in content.items()
            if isinstance(value, list) and any(isinstance(v, dict) for v in value)
        ]
        if not values or not (columns or rows):
            return
        what = (
            f"the rows in its field {rows[0]!r}: write that list alone" if rows else "columns, as by pandas' to_json()"
        )
        raise DataError(
            f"data file {self.path} holds one object with {what}. An array of objects or one object a line can be "
            "read, such as that of to_json(orient='records')"
        )

    @property
    def columns(self) -> list[str]:
        """All names of fields, in the order of their first appearance."""
        if self.has_pairs:
            names = dict.fromkeys(name for _, row in self._objects() for name in row)
            return [*PAIR_COLUMNS, *(name for name in names if name not in (*PAIR_COLUMNS, *_LISTS))]
        return list(dict.fromkeys(name for _, row in self._objects() for name in row))

    def rows(self, names: Sequence[str], chunk: int) -> Iterator[Columns]:
        """The columns of at most `chunk` rows after the other.

        Raises:
            DataError: a line is no JSON object, or lacks a column.
        """
        objects = self._pairs() if self.has_pairs else self._objects()
        while piece := list(islice(objects, chunk)):
            for place, row in piece:
                if not (self._fill or row.keys() >= set(names)):
                    check_names(names, self.columns, self.path, self.form, "Each object is a row")
                    absent = next(name for name in names if name not in row)
                    raise DataError(
                        f"{self.path}: {place} has no {absent!r}; it has {', '.join(map(repr, row))}. Give each row "
                        "all columns; null is a missing value"
                    )
            yield {name: [_value(row.get(name)) for _, row in piece] for name in names}

    def _pairs(self) -> Iterator[_Object]:
        for place, row in self._objects():
            texts = [(row.get(name) or [], label) for name, label in _LISTS.items()]
            others = {name: value for name, value in row.items() if name not in _LISTS}
            if not _is_pair(row) or not all(isinstance(part, list) for part, _ in texts):
                raise DataError(
                    f"{self.path}: {place} must hold a query and its texts, as the first row does: "
                    '{"query": "...", "pos": ["..."], "neg": ["..."]}'
                )
            for part, label in texts:
                for text in part:
                    yield place, others | {"passage": text, "label": label}

    def _objects(self) -> Iterator[_Object]:
        with reading(self.path, self._encoding), open_text(self.path, self._encoding) as file:
            found = self._of_array(file) if self._array else self._of_lines(file)
            for place, value in found:
                if not isinstance(value, dict):
                    raise DataError(
                        f"{self.path}: {place} must hold one JSON object with a field for each column, got "
                        f"{type(value).__name__}. An array of objects or one object a line can be read"
                    )
                yield place, value

    def _of_array(self, file: TextIO) -> Iterator[tuple[str, Any]]:
        if self._values is None:
            self._values = self._parse(file.read(), "")
        return ((f"row {number}", value) for number, value in enumerate(self._values, 1))

    def _of_lines(self, lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", self._parse(line, f"line {number} ")

    def _parse(self, text: str, place: str) -> Any:
        def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found = dict(pairs)
            if len(found) < len(pairs):
                names = [name for name, _ in pairs]
                twice = next(name for name in names if names.count(name) > 1)
                raise DataError(f"{self.path}: {place}has the field {twice!r} twice: remove or rename one")
            return found

        try:
            return json.loads(text, object_pairs_hook=fields)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{self.path}: {place}is not valid JSON: {error}. An array of objects or one object a line can be read"
            ) from error
        except RecursionError as error:
            raise DataError(f"{self.path}: {place}is nested too deeply to be a row") from error


def _value(value: Any) -> Any:
    """NaN, which Python and pandas write for a missing value, is one."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _is_pair(row: dict[str, Any]) -> bool:
    return isinstance(row.get("query"), str) and isinstance(row.get("pos"), list)
