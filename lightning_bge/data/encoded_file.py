"""Files, read and tokenized; kept by the process, so that the trials of a study read each file once."""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lightning_bge.data.tables.config import TableConfig
from lightning_bge.data.tables.files import HUB, Files, expand_files
from lightning_bge.data.tables.label_lists import label_key
from lightning_bge.data.tables.labels import Origin, encode_labels, fit_labels
from lightning_bge.data.tables.readers import RowNames, Table, read_table
from lightning_bge.data.tables.splits import SplitConfig, folds_hash, make_folds, make_outer_folds
from lightning_bge.data.tokens.cache import TokenArrays, hash_texts, tokenize_cached
from lightning_bge.data.tokens.tokenizer import effective_max_length, load_tokenizer, tokenizer_fingerprint
from lightning_bge.data.tokens.truncation import warn_of_truncation
from lightning_bge.tokenization import NO_WINDOWS, WindowConfig
from lightning_bge.types import Task

Stamp = tuple[tuple[str, int, int], ...]


def stamp(path: str | Path) -> Stamp:
    """Name, time of change (ns) and size of a file or of the files of a folder; empty where it does not exist."""
    path = Path(path).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    found = [(str(file.resolve()), file.stat()) for file in files if file.is_file()]
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in found)


def stamp_of_files(files: Files) -> Stamp:
    """The stamps of all files that a name, a pattern or several of them stand for; a data set on the hub has none."""
    return tuple(part for name in expand_files(files) if not name.startswith(HUB) for part in stamp(name))


@dataclass(frozen=True)
class TokenizerKey:
    """Which tokenizer; with `stamp` a folder that has changed has another key."""

    name: str
    revision: str | None
    trust_remote_code: bool
    stamp: Stamp


@dataclass(frozen=True)
class Source:
    """One or several files and everything that decides how they are encoded.

    Attributes:
        files: see `expand_files`.
        stamp: of the files, so that a changed one is not taken for the one read before.
        max_rows: keep only the first rows; None: all.
        max_length: the requested limit, before the tokenizer's own.
        windows: what becomes of longer rows.
        cache_gb: limit of the cache; None: no limit.
    """

    files: Files
    stamp: Stamp
    text_columns: tuple[str, ...]
    label_column: str | tuple[str, ...] | None
    group_column: str | None
    table: TableConfig
    max_rows: int | None
    tokenizer: TokenizerKey
    max_length: int
    cache_dir: str
    windows: WindowConfig = NO_WINDOWS
    cache_gb: float | None = None


@dataclass(frozen=True)
class EncodedFile:
    """A file's rows without their texts.

    Attributes:
        tokens: token ids.
        raw_labels: as read, or None.
        names: of the rows, for messages.
        text_hashes: int64 [N], equal for rows of equal texts; comparable within this process.
        groups: int64 [N], positions in `group_names`, or None.
        group_names: sorted.
        data_hash: sha256 (hex) of texts, labels and groups.
        tokenizer_hash: sha256 (hex) of the tokenizer's content, whatever its name.
        max_length: the limit in effect.
    """

    tokens: TokenArrays
    raw_labels: list[Any] | None
    names: RowNames
    text_hashes: np.ndarray
    groups: np.ndarray | None
    group_names: tuple[str, ...]
    data_hash: str
    tokenizer_hash: str
    max_length: int


@dataclass(frozen=True)
class TrainingFile:
    """The training file with numbers for labels, and its folds.

    Attributes:
        file: all rows.
        label_names: of all rows, so that they are the same in each outer fold.
        labels: encoded labels of all rows.
        outer: int64, row numbers of the outer fold, ascending; empty where there is none.
        folds: validation rows of each fold, outside of the outer one; none with a separate validation file.
        folds_hash: of `folds`, and of the outer fold where there is one.
    """

    file: EncodedFile
    label_names: tuple[str, ...]
    labels: np.ndarray
    outer: np.ndarray
    folds: tuple[np.ndarray, ...]
    folds_hash: str


@lru_cache(maxsize=4)
def _tokenizer(key: TokenizerKey) -> Any:
    return load_tokenizer(key.name, key.revision, key.trust_remote_code)


@lru_cache(maxsize=4)
def _fingerprint(key: TokenizerKey) -> str:
    return tokenizer_fingerprint(_tokenizer(key))


def _read(source: Source) -> Table:
    return read_table(
        source.files,
        source.text_columns,
        label_column=source.label_column,
        group_column=source.group_column,
        config=source.table,
        max_rows=source.max_rows,
    )


def _hash_table(table: Table) -> str:
    digest = hashlib.sha256(hash_texts(table.texts).encode())
    labels = None if table.labels is None else [_normal_form(label) for label in table.labels]
    digest.update(json.dumps([labels, table.groups]).encode())
    return digest.hexdigest()


def _normal_form(label: Any) -> Any:
    """The same for a label however a file holds it, as plain data."""
    if isinstance(label, dict):
        return {name: _normal_form(value) for name, value in label.items()}
    if isinstance(label, list | tuple | set):
        return [_normal_form(value) for value in label]
    return None if label is None else label_key(label)


@dataclass(frozen=True)
class CheckedFile:
    """What `check_file` has found: as in `EncodedFile`, and the encoded labels."""

    names: RowNames
    data_hash: str
    text_hashes: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None


@lru_cache(maxsize=16)
def check_file(source: Source, task: Task, labels: tuple[str, ...], origin: Origin) -> CheckedFile:
    """Read a file and check its labels, which `origin` has named, without tokenizing it.

    Raises:
        UserError: the file, or a label in it, is wrong.
    """
    table = _read(source)
    encoded = encode_labels(table.labels or [], labels, task, table.names, source.table.label_separator, origin)
    return CheckedFile(table.names, _hash_table(table), _hash_texts(table), encoded, _group_numbers(table)[0])


def _group_numbers(table: Table) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The number of each row's group (int64 [N]), and the groups' names in the order of their numbers."""
    if table.groups is None:
        return None, ()
    unique, groups = np.unique(np.array(table.groups, dtype=object), return_inverse=True)
    return groups.astype(np.int64), tuple(unique.tolist())


def _hash_texts(table: Table) -> np.ndarray:
    return np.fromiter(map(hash, table.texts), np.int64, len(table.texts))


@lru_cache(maxsize=16)  # a study over four models and four lengths has as many
def load_file(source: Source) -> EncodedFile:
    """Read and tokenize a file."""
    table = _read(source)
    tokenizer = _tokenizer(source.tokenizer)
    max_length = effective_max_length(tokenizer, source.max_length, len(source.text_columns) == 2)
    file, rows = str(table.names), table.names.rows
    tokens = tokenize_cached(
        table.texts,
        tokenizer,
        max_length,
        source.cache_dir,
        source.windows,
        name=lambda row: f"{file}: {rows([row])}",
        cache_gb=source.cache_gb,
    )
    warn_of_truncation(file, tokens, max_length, tokenizer.model_max_length, source.windows)
    groups, names = _group_numbers(table)
    hashes = _hash_table(table), _fingerprint(source.tokenizer)
    texts = _hash_texts(table)
    return EncodedFile(tokens, table.labels, table.names, texts, groups, names, *hashes, max_length)


@lru_cache(maxsize=16)
def load_training_file(source: Source, task: Task, split: SplitConfig | None) -> TrainingFile:
    """Read and tokenize a training file, find its labels and, with `split`, its folds.

    With `split.outer_fold` the folds are made of the rows outside of that outer fold.
    """
    file = load_file(source)
    raw, separator = file.raw_labels or [], source.table.label_separator
    names = fit_labels(raw, task, file.names, source.table.labels, separator)
    labels = encode_labels(raw, names, task, file.names, separator)
    rows, outer, folds = np.arange(len(labels)), np.arange(0), []
    if split is not None and split.outer_fold is not None:
        outer = make_outer_folds(labels, task, split, groups=file.groups, label_names=names)[split.outer_fold]
        rows = np.setdiff1d(rows, outer)
    if split is not None:
        groups = None if file.groups is None else file.groups[rows]
        folds = [rows[fold] for fold in make_folds(labels[rows], task, split, groups=groups, label_names=names)]
    for array in (labels, outer, *folds):
        array.setflags(write=False)  # all data modules of the process have the same arrays
    digest = folds_hash([outer, *folds] if len(outer) else folds)
    return TrainingFile(file, names, labels, outer, tuple(folds), digest)
