"""The first pass over the files to predict: whether all rows can be read and written, and how many there are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import pyarrow as pa

from lightning_bge.data.pieces import Piece, TextPieces
from lightning_bge.data.tables.readers import has_lone_surrogate
from lightning_bge.errors import DataError
from lightning_bge.prediction.formats import OutputFormat, common_type, type_of


@dataclass
class CheckedRows:
    """What was found.

    Attributes:
        rows: their number in all files.
        pieces: the number of pieces.
        types: Arrow's types of the columns to carry over, where the format needs them.
    """

    rows: int = 0
    pieces: int = 0
    types: dict[str, pa.DataType] = field(default_factory=dict)


def check_rows(pieces: TextPieces, form: OutputFormat) -> CheckedRows:
    """Read all rows once.

    Args:
        pieces: the rows.
        form: of the output.

    Raises:
        DataError: a row is malformed, or can't be written in this format.
    """
    found = CheckedRows()
    known = len(pieces.types) == len(pieces.files)  # Parquet alone, whose types are kept
    for piece in pieces:
        found.rows += len(piece)
        found.pieces += 1
        if form.kind != "jsonl":
            for name, values in piece.kept.items():
                _check_texts(piece, name, values)
        if form.kind == "parquet" and not known:
            for name, values in piece.kept.items():
                found.types[name] = common_type(found.types.get(name, pa.null()), type_of(values))
    if form.kind == "parquet" and known:
        for name in pieces.columns:
            found.types[name] = reduce(common_type, (types[name] for types in pieces.types), pa.null())
    return found


def _check_texts(piece: Piece, name: str, values: Sequence[Any]) -> None:
    for number, value in enumerate(values):
        if isinstance(value, str) and has_lone_surrogate(value):
            raise DataError(
                f"keep: row {piece.first_row + number + 1} of {piece.file} has half a surrogate pair in column "
                f"{name!r}, which only .jsonl can hold. Leave the column out of keep, or write .jsonl"
            )
