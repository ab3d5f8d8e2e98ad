"""Tokenize once: token ids in Arrow files that are named by their content and memory-mapped by every reader."""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers

from lightning_bge.data.tokens.cache_folder import limit_cache
from lightning_bge.data.tokens.tokenizer import tokenizer_fingerprint
from lightning_bge.errors import DataError
from lightning_bge.runtime.cache_dir import CACHE_ENV, default_cache_dir, mark_used
from lightning_bge.tokenization import NO_WINDOWS, NameRow, WindowConfig, full_lengths, name_row, tokenize_rows

log = logging.getLogger(__name__)

# Part of every key: raise it when the content of the files changes its meaning.
_VERSION = "2"
_CHUNK = 4096
_STALE_SECONDS = 86400


@dataclass(frozen=True)
class TokenArrays:
    """Token ids of N rows, T tokens in all, end to end; of a cache file views of its memory map, read-only.

    Attributes:
        input_ids: int32 [T].
        offsets: int64 [N + 1], where each row starts, and T at the end.
        token_type_ids: uint8 [T], or None where the tokenizer makes none.
        lengths: int32 [N]; with windows the tokens of all windows of a row.
        path: the file; empty where the rows are in memory alone, and can't be sent to another process.
        window_offsets: int64 [N + 1], where the windows of each row start in `window_lengths`, and their number at the
            end; None where each row is one sequence.
        window_lengths: int32, tokens of each window, or None.
        full_lengths: int32 [N], tokens that each row would have if nothing of it were dropped; see `full_lengths`.
            None: not known.
    """

    input_ids: np.ndarray
    offsets: np.ndarray
    token_type_ids: np.ndarray | None
    lengths: np.ndarray
    path: Path
    window_offsets: np.ndarray | None = None
    window_lengths: np.ndarray | None = None
    full_lengths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[Callable[[Path], TokenArrays], tuple[Path]]:
        # A worker process maps the same file instead of getting a copy of the arrays.
        mark_used(self.path)
        return open_tokens, (self.path,)


def hash_texts(texts: Sequence[tuple[str, ...]]) -> str:
    """Sha256 (hex) of rows of texts; each text is preceded by its length, so no two lists have the same hash."""
    digest = hashlib.sha256()
    for row in texts:
        digest.update(len(row).to_bytes(1, "little"))
        for text in row:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()


def tokenize_cached(
    texts: Sequence[tuple[str, ...]],
    tokenizer: Any,
    max_length: int,
    cache_dir: str | Path | None = None,
    windows: WindowConfig = NO_WINDOWS,
    name: NameRow = name_row,
    cache_gb: float | None = None,
) -> TokenArrays:
    """Token ids of rows of one or two texts, from the cache where it has them.

    Truncated as `tokenizer(a, b, truncation=True, max_length=max_length)` does it: the longer text loses tokens first.
    With a stride longer rows are cut into windows instead: see `tokenize_rows`.

    Args:
        texts: N rows, all of one or all of two texts.
        tokenizer: a fast tokenizer of transformers.
        max_length: the most tokens of a sequence, special tokens counted.
        cache_dir: folder of the cache; None: `default_cache_dir()`.
        windows: what becomes of longer rows.
        name: names a row in messages.
        cache_gb: see `limit_cache`, which is called after a file was written; in units of 2**30 bytes. None: no limit.

    Raises:
        ConfigError: the stride of the windows is too large for `max_length`.
        DataError: the folder cannot be written or is full, or a row has no token at all, or no room for windows.
    """
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    parts = [_VERSION, tokenizers.__version__, tokenizer_fingerprint(tokenizer), hash_texts(texts), str(max_length)]
    if windows.stride is not None:
        parts.append(f"windows {windows.stride} {windows.max_windows}")
    path = folder / f"{hashlib.sha256('|'.join(parts).encode()).hexdigest()}.arrow"
    if path.exists():
        mark_used(path)
        try:
            return open_tokens(path, rows=len(texts))
        except (pa.ArrowException, OSError, ValueError) as error:
            log.warning("token cache %s cannot be read (%s): it is written once more", path, error)
    log.info("tokenizing %d rows into %s", len(texts), path)
    batch = _tokenize(texts, tokenizer, max_length, windows, name)
    empty = np.flatnonzero(_arrays(batch, path).lengths == 0)
    if len(empty):
        raise DataError(
            f"{name(int(empty[0]))}: the tokenizer makes no token of it ({len(empty)} such rows): drop them"
        )
    _write(path, batch)
    if cache_gb is not None:
        limit_cache(folder, cache_gb * 2**30)
    return open_tokens(path, rows=len(texts))


def tokenize_in_memory(
    texts: Sequence[tuple[str, ...]],
    tokenizer: Any,
    max_length: int,
    windows: WindowConfig = NO_WINDOWS,
    name: NameRow = name_row,
) -> TokenArrays:
    """As `tokenize_cached`, but the disk is not used, and a row may have no token at all."""
    return _arrays(_tokenize(texts, tokenizer, max_length, windows, name), Path())


def open_tokens(path: Path, rows: int | None = None) -> TokenArrays:
    """Map a cache file.

    Raises:
        ValueError, pyarrow.ArrowInvalid: the file is cut short, or has not as many rows as its header or `rows` says.
    """
    batch = _map_batch(path)
    header = (batch.schema.metadata or {}).get(b"rows")
    if header != str(batch.num_rows).encode() or rows not in (None, batch.num_rows):
        raise ValueError(f"{batch.num_rows} rows, its header says {header!r}, expected {rows}")
    return _arrays(batch, Path(path))


def _arrays(batch: pa.RecordBatch, path: Path) -> TokenArrays:
    ids = batch.column("input_ids")
    offsets = ids.offsets.to_numpy()
    types = batch.column("token_type_ids").values.to_numpy() if "token_type_ids" in batch.schema.names else None
    windows = batch.column("windows") if "windows" in batch.schema.names else None
    return TokenArrays(
        input_ids=ids.values.to_numpy(),
        offsets=offsets,
        token_type_ids=types,
        lengths=np.diff(offsets).astype(np.int32),
        path=path,
        window_offsets=None if windows is None else windows.offsets.to_numpy(),
        window_lengths=None if windows is None else windows.values.to_numpy(),
        full_lengths=batch.column("full_lengths").to_numpy(),
    )


def concatenate_tokens(first: TokenArrays, second: TokenArrays) -> TokenArrays:
    """The rows of two cache files, one after the other, in a cache file of their own beside the first.

    A file and not arrays in memory: worker processes map it, and a large file needs no memory.

    Args:
        first: its rows come first.
        second: of the same tokenizer and length limit.

    Raises:
        DataError: the folder cannot be written or is full.
    """
    # both names are hashes of all that decides the content
    name = hashlib.sha256("|".join((_VERSION, first.path.stem, second.path.stem)).encode()).hexdigest()
    path, rows = first.path.with_name(f"{name}.arrow"), len(first) + len(second)
    if path.exists():
        mark_used(path)
    else:
        batches = [_map_batch(one.path).replace_schema_metadata(None) for one in (first, second)]
        [batch] = pa.Table.from_batches(batches).combine_chunks().to_batches()
        _write(path, batch.replace_schema_metadata({"rows": str(rows)}))
    return open_tokens(path, rows=rows)


def _map_batch(path: Path) -> pa.RecordBatch:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
    except FileNotFoundError as error:
        raise DataError(f"{path} was deleted while this run used it. Run the command again: it is made anew") from error
    if reader.num_record_batches != 1:
        raise ValueError(f"{reader.num_record_batches} record batches, expected 1")
    return reader.get_batch(0)


def _tokenize(
    texts: Sequence[tuple[str, ...]], tokenizer: Any, max_length: int, windows: WindowConfig, name: NameRow
) -> pa.RecordBatch:
    chunks: dict[str, list[np.ndarray]] = {"input_ids": [], "token_type_ids": []}
    sequences, counts, whole = [np.empty(0, np.int32)], [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for start in range(0, len(texts), _CHUNK):
        rows = texts[start : start + _CHUNK]
        found = tokenize_rows(rows, tokenizer, max_length, windows, _shifted(name, start))
        whole.append(np.array(full_lengths(rows, found, tokenizer, max_length), np.int32))
        sequences.append(np.fromiter(map(len, found.input_ids), np.int32, len(found.input_ids)))
        counts.append(np.array(found.windows or [1] * len(found.input_ids)))
        chunks["input_ids"].append(_flat(found.input_ids, np.int32))
        if found.token_type_ids is not None:
            chunks["token_type_ids"].append(_flat(found.token_type_ids, np.uint8))
    lengths, firsts = np.concatenate(sequences), np.concatenate(([0], np.cumsum(np.concatenate(counts))))
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))[firsts]
    columns: dict[str, pa.Array] = {
        column: _lists(offsets, np.concatenate(parts)) for column, parts in chunks.items() if parts
    }
    columns["full_lengths"] = pa.array(np.concatenate(whole))
    if windows.stride is not None:
        columns["windows"] = _lists(firsts, lengths)
    return pa.record_batch(columns).replace_schema_metadata({"rows": str(len(texts))})


def _shifted(name: NameRow, start: int) -> NameRow:
    return lambda row: name(start + row)


def _flat(rows: list[list[int]], dtype: type) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(rows), dtype)


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.LargeListArray:
    """A list of values for each row, end to end."""
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values))


def _write(path: Path, batch: pa.RecordBatch) -> None:
    """Write a whole file under another name and then rename it, so that no process ever reads half a file."""
    temporary: str | None = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_stale(path.parent)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem[:16]}-", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            with pa.ipc.new_file(file, batch.schema) as writer:
                writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"the disk is full, {batch.nbytes:,} bytes are needed" if full else str(error)
        raise DataError(
            f"cannot write the token cache in {path.parent}: {reason}. Make room, or set cache_dir or the "
            f"environment variable {CACHE_ENV} to another folder"
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _remove_stale(folder: Path) -> None:
    """Delete what killed processes left behind; a file younger than a day may still be written."""
    for leftover in folder.glob("*.tmp"):
        try:
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                leftover.unlink()
        except FileNotFoundError:
            continue  # another process was faster
