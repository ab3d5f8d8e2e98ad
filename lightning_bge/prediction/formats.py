"""Rows of predictions as CSV, TSV, JSON lines or Parquet."""

import csv
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_bge.data.tables.files import COMPRESSED
from lightning_bge.errors import ConfigError, DataError
from lightning_bge.runtime.output_file import put_in_place

KINDS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
ROW_GROUP = 65_536  # rows of a row group of Parquet

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class OutputFormat:
    """What the ending of an output's name says.

    Attributes:
        kind: csv, tsv, jsonl or parquet.
        compression: gzip, bz2 or zstd; None: none.
    """

    kind: str
    compression: str | None = None

    @classmethod
    def of(cls, path: str, stream: bool = False) -> "OutputFormat":
        """The format of an output.

        Args:
            path: its name.
            stream: whether it is a device or a pipe: it takes text without compression, CSV where no ending says else.

        Raises:
            ConfigError: the ending is unknown, or not for a stream.
        """
        name = Path(path)
        compression = COMPRESSED.get(name.suffix.lower())
        kind = KINDS.get((Path(name.stem) if compression else name).suffix.lower())
        if stream:
            if compression or kind == "parquet":
                raise ConfigError(
                    f"output: a pipe takes csv, tsv or jsonl, got {path}. Name a file, or pipe it into gzip"
                )
            return cls(kind or "csv")
        if kind is None or (compression and kind == "parquet"):
            raise ConfigError(
                f"output: expected a name that ends in .csv, .tsv, .jsonl or .parquet, of which the first three may be "
                f"followed by {', '.join(COMPRESSED)}, got {path}"
            )
        return cls(kind, compression)

    def encoder(self, names: Sequence[str], types: Mapping[str, pa.DataType]) -> "Encoder":
        """What makes bytes of rows.

        Args:
            names: of the columns, in their order.
            types: Arrow's types of the columns, which Parquet needs.
        """
        if self.kind == "parquet":
            return _ArrowEncoder(pa.schema([(name, types[name]) for name in names]))
        if self.kind == "jsonl":
            return _JSONEncoder()
        return _CSVEncoder(names, "," if self.kind == "csv" else "\t")

    def complete(self, draft: Path, target: Path) -> None:
        """Make the file of a draft, which holds what the encoder made, and remove the draft."""
        if self.compression is None and self.kind != "parquet":
            put_in_place(draft, target)
            return
        made = draft.with_name(f"{draft.name}.made")  # a name that the next run replaces, should this one be killed
        made.unlink(missing_ok=True)
        made.touch(0o600)
        try:
            if self.kind == "parquet":
                _write_parquet(draft, made)
            else:
                with draft.open("rb") as plain, pa.CompressedOutputStream(str(made), self.compression) as packed:
                    shutil.copyfileobj(plain, packed, 1 << 20)
            put_in_place(made, target)
        finally:
            made.unlink(missing_ok=True)
        draft.unlink()


class Encoder(Protocol):
    """Makes bytes that can be appended to each other: the header, then rows."""

    header: bytes

    def encode(self, columns: Columns) -> bytes:
        """The bytes of some rows: a list of values for each column; None is a missing value."""


class _CSVEncoder:
    def __init__(self, names: Sequence[str], delimiter: str) -> None:
        # This line end makes the writer enclose fields with either of its characters in every version of Python.
        self._text = io.StringIO()
        self._writer = csv.writer(self._text, delimiter=delimiter, lineterminator="\r\n")
        self.header = self._line(names).encode()

    def encode(self, columns: Columns) -> bytes:
        rows = zip(*columns.values(), strict=True)
        return "".join(self._line([_field(value) for value in row]) for row in rows).encode()

    def _line(self, fields: Sequence[Any]) -> str:
        self._text.seek(0)
        self._text.truncate()
        self._writer.writerow(fields)
        return self._text.getvalue().removesuffix("\r\n") + "\n"


class _JSONEncoder:
    header = b""

    def encode(self, columns: Columns) -> bytes:
        rows = zip(*columns.values(), strict=True)
        return "".join(f"{_json(dict(zip(columns, row, strict=True)))}\n" for row in rows).encode()


class _ArrowEncoder:
    """Record batches of Arrow's stream format, of which `_write_parquet` makes a Parquet file."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self.header = schema.serialize().to_pybytes()

    def encode(self, columns: Columns) -> bytes:
        arrays = [self._array(name, values) for name, values in columns.items()]
        return pa.record_batch(arrays, schema=self._schema).serialize().to_pybytes()

    def _array(self, name: str, values: Sequence[Any]) -> pa.Array:
        kind = self._schema.field(name).type
        if pa.types.is_string(kind):
            values = [None if value is None else text_of(value) for value in values]
        try:
            return pa.array(values, kind)
        except (pa.ArrowException, OverflowError) as error:
            raise DataError(
                f"keep: column {name!r} can't be written as {kind} ({error}). Leave it out of keep, or write .jsonl"
            ) from error


def _write_parquet(draft: Path, target: Path) -> None:
    with pa.OSFile(str(draft)) as file:
        reader = pa.ipc.open_stream(file)
        with pq.ParquetWriter(target, reader.schema) as writer:
            batches: list[pa.RecordBatch] = []
            for batch in reader:
                batches.append(batch)
                if sum(map(len, batches)) >= ROW_GROUP:
                    writer.write_table(pa.Table.from_batches(batches))
                    batches.clear()
            if batches:
                writer.write_table(pa.Table.from_batches(batches))


def text_of(value: Any) -> str:
    """A value as a text: lists and dicts as JSON, bytes in hexadecimal digits."""
    if isinstance(value, bytes):
        return value.hex()
    return _json(value) if isinstance(value, list | dict | bool) else str(value)


def _field(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else text_of(value)


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=text_of)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which has to be escaped
        return json.dumps(value, default=text_of)
    return text


# ---------------------------------------------------------------------- types of columns for Parquet


def common_type(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """A type that holds the values of both: a text where there is no other."""
    first, second = (kind.value_type if pa.types.is_dictionary(kind) else kind for kind in (first, second))
    try:
        return pa.unify_schemas(
            [pa.schema([("", first)]), pa.schema([("", second)])], promote_options="permissive"
        ).types[0]
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return pa.string()


def type_of(values: Sequence[Any]) -> pa.DataType:
    """Arrow's type of values; a text where they have none in common."""
    try:
        return pa.array(values).type
    except (pa.ArrowException, OverflowError, UnicodeError):
        return pa.string()
