"""Files of any size, read, tokenized and cut into batches piece by piece."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lightning_bge.data.batches.config import BatchingConfig
from lightning_bge.data.batches.micro_batches import EncodedDataset
from lightning_bge.data.batches.samplers import eval_batches
from lightning_bge.data.encoded_file import Source
from lightning_bge.data.tables.columnar import ParquetFile
from lightning_bge.data.tables.files import expand_files
from lightning_bge.data.tables.readers import DataFile, log_file_format, open_file, text_fault
from lightning_bge.data.tables.rows import check_names
from lightning_bge.data.tokens.cache import TokenArrays, tokenize_in_memory
from lightning_bge.data.tokens.tokenizer import effective_max_length, load_tokenizer
from lightning_bge.data.tokens.truncation import Truncation
from lightning_bge.errors import DataError
from lightning_bge.types import Batch

# Large enough for micro-batches of similar lengths, small enough that little is lost when a process is killed.
PIECE_ROWS = 4096


@dataclass
class Piece:
    """Some rows of a file, one after the other.

    Attributes:
        file: its name.
        first_row: the number of the first of them in the file, from 0.
        kept: the values of each column that is carried over; None is a missing one.
        texts: one or two texts for each row; empty ones where there is a reason.
        reasons: why a row can't be scored; None where it can.
    """

    file: str
    first_row: int
    kept: dict[str, list[Any]]
    texts: list[tuple[str, ...]]
    reasons: list[str | None]

    def __len__(self) -> int:
        return len(self.reasons)


class TextPieces:
    """Rows of files with the columns to carry over, which may be iterated over more than once.

    Args:
        source: the files, and how they are read.
        keep: the columns to carry over; None: all but the texts.
        rows: the most rows of a piece.

    Attributes:
        files: their names.
        columns: the columns to carry over.
        types: Arrow's types of these columns, of each file that knows them, which Parquet files do.

    Raises:
        DataError: a file can't be read, or lacks a text column or one that is to be carried over.
    """

    def __init__(self, source: Source, keep: Sequence[str] | None = None, rows: int = PIECE_ROWS) -> None:
        self._texts, self._rows = source.text_columns, rows
        asked = [*source.text_columns, *(keep or ())]
        self.files = expand_files(source.files)
        self._files: list[tuple[str, DataFile, list[str]]] = []
        for name in self.files:
            file = open_file(name, asked, source.table, fill=True)
            log_file_format(name, file)
            columns = list(file.columns)
            check_names(source.text_columns, columns, name, file.form)
            _check_kept(name, columns, source.text_columns, keep)
            self._files.append((name, file, columns))
        every = dict.fromkeys(column for _, _, columns in self._files for column in columns)
        self.columns = list(
            dict.fromkeys(keep if keep is not None else (name for name in every if name not in self._texts))
        )
        self.types = [
            {name: file.types.get(name, pa.null()) for name in self.columns}
            for _, file, _ in self._files
            if isinstance(file, ParquetFile)
        ]

    def __iter__(self) -> Iterator[Piece]:
        """Raises `DataError` where a file has no rows, or a row is malformed."""
        for name, file, columns in self._files:
            row = 0
            names = [column for column in dict.fromkeys([*self._texts, *self.columns]) if column in columns]
            for found in file.rows(names, self._rows):
                count = len(next(iter(found.values())))
                yield self._piece(name, row, found, count)
                row += count
            if not row:
                raise DataError(f"data file {name} has a header but no rows")

    def _piece(self, name: str, row: int, columns: dict[str, list[Any]], count: int) -> Piece:
        reasons: list[str | None] = [None] * count
        for column in reversed(self._texts):  # the first column's reason is given
            for place, value in enumerate(columns[column]):
                fault = text_fault(value)
                reasons[place] = reasons[place] if fault is None else f"{fault} in column {column!r}"
        empty = ("",) * len(self._texts)
        rows = zip(*(columns[column] for column in self._texts), strict=True)
        texts = [tuple(map(str, row)) if reason is None else empty for row, reason in zip(rows, reasons, strict=True)]
        kept = {column: columns.get(column) or [None] * count for column in self.columns}
        return Piece(name, row, kept, texts, reasons)


def _check_kept(name: str, columns: list[str], texts: Sequence[str], keep: Sequence[str] | None) -> None:
    missing = [column for column in keep or () if column not in columns]
    if missing:
        raise DataError(
            f"keep: data file {name} has no column {missing[0]!r}; its columns are {', '.join(map(repr, columns[:20]))}"
        )
    kept = keep if keep is not None else [column for column in columns if column not in texts]
    twice = next((column for column in kept if columns.count(column) > 1), None)
    if twice is not None:
        raise DataError(
            f"keep: data file {name} has more than one column {twice!r}: rename one of them, or name the columns to "
            "carry over"
        )


@dataclass
class LoadedPiece:
    """A piece whose batches are being computed.

    Attributes:
        piece: its rows.
        batches: number of its batches that are still to come back.
        found: what came back.
    """

    piece: Piece
    batches: int
    found: list[Any] = field(default_factory=list)


class PieceLoader:
    """Batches of one micro-batch, piece after piece; within a piece the longest rows come first.

    It has no length, as the rows have not been tokenized yet. A micro-batch's `rows` are positions in its piece. Each
    piece has at least one batch, which may be empty, and all ranks have as many.

    Args:
        pieces: the rows.
        source: tokenizer and limits.
        batching: the size of micro-batches.

    Attributes:
        max_length: the limit in effect.
        pending: pieces whose batches were handed out, oldest first; whoever gets the batches back removes them.
        first: number of the first piece, from 0; those before it are left out.
        rank: of this process, and `ranks` their number: the ranks take the batches of a piece in turns.
        truncation: what was truncated so far.
    """

    def __init__(self, pieces: TextPieces, source: Source, batching: BatchingConfig) -> None:
        key = source.tokenizer
        self._tokenizer = load_tokenizer(key.name, key.revision, key.trust_remote_code)
        self.max_length = effective_max_length(self._tokenizer, source.max_length, len(source.text_columns) == 2)
        self._pieces, self._windows = pieces, source.windows
        self.limit = batching.eval_limit(batching.initial_max_tokens)
        self._pin = torch.cuda.is_available() if batching.pin_memory is None else batching.pin_memory
        self.pending: deque[LoadedPiece] = deque()
        self.first, self.rank, self.ranks = 0, 0, 1
        self.truncation = Truncation()

    def __iter__(self) -> Iterator[Batch]:
        number = -1
        for number, piece in enumerate(self._pieces):
            if number >= self.first:
                yield from self._batches(piece)
        if number < self.first:
            yield Batch(())  # all pieces were done before: a trainer needs one batch

    def describe_truncation(self) -> str | None:
        """One line on rows that were truncated; None where none was."""
        return self.truncation.describe(self.max_length, self._tokenizer.model_max_length, self._windows)

    def _batches(self, piece: Piece) -> Iterator[Batch]:
        tokens = self._tokenize(piece)
        for row in np.flatnonzero(tokens.lengths == 0).tolist():
            piece.reasons[row] = piece.reasons[row] or "the tokenizer makes no token of it"
        piece.texts = []  # they are tokens now
        self.truncation.add(tokens)
        dataset = EncodedDataset(tokens, None, None, self.limit, self._windows.pooling)
        rows = np.array([row for row, reason in enumerate(piece.reasons) if reason is None], dtype=np.int64)
        batches = eval_batches(rows, tokens.lengths, self.limit, self.rank, self.ranks) or [[]]
        self.pending.append(LoadedPiece(piece, len(batches)))
        for rows_of_batch in batches:
            batch = dataset[rows_of_batch]
            yield batch.pin_memory() if self._pin else batch

    def _tokenize(self, piece: Piece) -> TokenArrays:
        """Token ids of all rows; a row that leaves no room for windows gets a reason."""

        def tokenize(texts: list[tuple[str, ...]]) -> TokenArrays:
            return tokenize_in_memory(texts, self._tokenizer, self.max_length, self._windows, lambda row: "windows")

        def find_faults(start: int, stop: int) -> None:
            try:
                tokenize(piece.texts[start:stop])
            except DataError as error:
                if stop - start == 1:
                    piece.reasons[start] = str(error)
                    piece.texts[start] = ("",) * len(piece.texts[start])
                    return
                middle = (start + stop) // 2
                find_faults(start, middle)
                find_faults(middle, stop)

        try:
            return tokenize(piece.texts)
        except DataError:
            find_faults(0, len(piece))
            return tokenize(piece.texts)
