"""One file, read and tokenised; remembered by the process, so that each trial does not do it again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lightning_bge.data.tables.labels import encode_labels, fit_labels
from lightning_bge.data.tables.readers import TableConfig, read_table
from lightning_bge.data.tables.splits import SplitConfig, folds_hash, make_folds
from lightning_bge.data.tokens.cache import TokenArrays, hash_texts, tokenize_cached
from lightning_bge.data.tokens.tokenizer import effective_max_length, load_tokenizer
from lightning_bge.types import Task

Stamp = tuple[tuple[str, int, int], ...]


def stamp(path: str | Path) -> Stamp:
    """Name, time of change (ns) and size of a file or of the files of a folder; empty where there is none."""
    path = Path(path).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    found = [(str(file.resolve()), file.stat()) for file in files if file.is_file()]
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in found)


@dataclass(frozen=True)
class TokenizerKey:
    """Which tokenizer; `stamp` makes the key of a changed folder another one."""

    name: str
    revision: str | None
    trust_remote_code: bool
    stamp: Stamp


@dataclass(frozen=True)
class Source:
    """A file and all that decides what is made of it. `max_length` is the wish, before the tokenizer's own limit."""

    path: str
    stamp: Stamp
    text_columns: tuple[str, ...]
    label_column: str | None
    group_column: str | None
    table: TableConfig
    max_rows: int | None
    tokenizer: TokenizerKey
    max_length: int
    cache_dir: str


@dataclass(frozen=True)
class EncodedFile:
    """A file's rows without their texts.

    Attributes:
        tokens: token ids.
        raw_labels: as read, or None.
        groups: int64 [N], positions in `group_names`, or None.
        group_names: sorted.
        data_hash: sha256 (hex) of texts, labels and groups.
        max_length: the limit in force.
    """

    tokens: TokenArrays
    raw_labels: list[Any] | None
    groups: np.ndarray | None
    group_names: tuple[str, ...]
    data_hash: str
    max_length: int


@dataclass(frozen=True)
class Training:
    """The training file with numbers for labels, and its folds (none with a separate validation file)."""

    file: EncodedFile
    names: tuple[str, ...]
    labels: np.ndarray
    folds: tuple[np.ndarray, ...]
    folds_hash: str


@lru_cache(maxsize=4)
def remembered_tokenizer(key: TokenizerKey) -> Any:
    """The tokenizer of a key."""
    return load_tokenizer(key.name, key.revision, key.trust_remote_code)


@lru_cache(maxsize=16)  # a search over four models and four lengths has so many
def load_file(source: Source) -> EncodedFile:
    """Read and tokenise a file."""
    table = read_table(
        source.path, source.text_columns, source.label_column, source.group_column, source.table, source.max_rows
    )
    tokenizer = remembered_tokenizer(source.tokenizer)
    max_length = effective_max_length(tokenizer, source.max_length, len(source.text_columns) == 2)
    tokens = tokenize_cached(table.texts, tokenizer, max_length, source.cache_dir)
    digest = hashlib.sha256(hash_texts(table.texts).encode())
    digest.update(json.dumps([table.labels, table.groups], default=str).encode())
    groups, names = None, ()
    if table.groups is not None:
        unique, groups = np.unique(np.array(table.groups, dtype=object), return_inverse=True)
        names = tuple(unique.tolist())
        groups = groups.astype(np.int64)
    return EncodedFile(tokens, table.labels, groups, names, digest.hexdigest(), max_length)


@lru_cache(maxsize=16)
def load_training(source: Source, task: Task, split: SplitConfig | None) -> Training:
    """Read and tokenise a training file, find its labels and, with `split`, its folds."""
    file = load_file(source)
    raw, separator = file.raw_labels or [], source.table.label_separator
    names = fit_labels(raw, task, source.table.labels, separator)
    labels = encode_labels(raw, names, task, source.path, separator)
    folds = make_folds(len(labels), task, labels, file.groups, split, names) if split is not None else []
    for array in (labels, *folds):
        array.setflags(write=False)  # shared by all data modules of the process
    return Training(file, names, labels, tuple(folds), folds_hash(folds))
