"""What a data module's arguments say of a file: how it is read and encoded, and what the model's outputs mean."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from lightning_bge.data.checkpoint_labels import checkpoint_labels
from lightning_bge.data.encoded_file import Source, TokenizerKey, stamp, stamp_of_files
from lightning_bge.data.tables.config import TableConfig
from lightning_bge.data.tables.files import Files
from lightning_bge.data.tables.json_rows import PAIR_COLUMNS
from lightning_bge.data.tables.labels import Origin, fit_labels
from lightning_bge.data.tables.readers import has_pairs, read_table
from lightning_bge.errors import ConfigError
from lightning_bge.runtime.cache_dir import default_cache_dir
from lightning_bge.runtime.log_once import log_once
from lightning_bge.tokenization import NO_WINDOWS, WindowConfig
from lightning_bge.types import Schema, Task

log = logging.getLogger(__name__)

TEXT_COLUMNS = ("text_a", "text_b")  # where none are named


class DataArguments(Protocol):
    """The arguments of `TextDataModule` that are needed here."""

    tokenizer: str
    revision: str | None
    trust_remote_code: bool
    task: Task
    train_file: str | list[str] | None
    text_columns: tuple[str, ...] | None
    label_column: str | tuple[str, ...]
    group_column: str | None
    max_length: int
    cache_dir: str | None
    cache_gb: float | None
    table: TableConfig
    windows: WindowConfig


def has_groups(arguments: Mapping[str, Any]) -> bool:
    """Whether the rows of a data module with these arguments have groups; a file may bring them."""
    if arguments["group_column"] is not None:
        return True
    files = arguments["train_file"] or arguments["val_file"] or arguments["test_file"]
    return files is not None and has_pairs(files, TableConfig(**arguments["table"]))


def known_schema(data: DataArguments, files: Files) -> Schema:
    """From the exported model's folder, else from the arguments, the training file, and the files that are read.

    Raises:
        ConfigError: the names of the model's outputs are not known, or see `exported_schema`.
    """
    schema = exported_schema(data)
    if schema is not None:
        chosen = data.text_columns or schema.text_columns
        if schema.task != data.task:
            log.info("task %s of the exported model is used, not %s", schema.task, data.task)
        length, windows = min(data.max_length, schema.max_length), windows_of(data, schema)
        return replace(schema, text_columns=chosen, max_length=length, windows=windows)
    columns = make_source(data, files, data.text_columns, data.max_length).text_columns
    labels = _known_labels(data)
    if data.task == "binary" and len(labels) == 2:
        text = f"{labels[1]!r} is the positive label, {labels[0]!r} the negative one"
        log_once(log, logging.INFO, f"{text}; --data.table.labels '[{labels[1]}, {labels[0]}]' exchanges them")
    return Schema(data.task, labels, columns, data.max_length, windows=data.windows)


def labels_origin(data: DataArguments, trained: bool) -> Origin:
    """Where the names of the labels in a schema come from.

    Args:
        data: the arguments.
        trained: whether the training file has been read for it; else it is that of `known_schema`.
    """
    if not trained and exported_schema(data) is not None:
        return "the model"
    if data.table.labels is not None:
        return "data.table.labels"
    return "the model" if data.train_file is None else "the training file"


def exported_schema(data: DataArguments) -> Schema | None:
    """That of the folder whose tokenizer is used, where it holds an exported model.

    Raises:
        ConfigError: the model is for single texts and pairs are named, or the reverse.
    """
    schema, chosen = Schema.load(Path(data.tokenizer).expanduser()) if data.tokenizer else None, data.text_columns
    if schema is not None and chosen is not None and len(chosen) != len(schema.text_columns):
        forms = ("", "single texts", "pairs of texts")
        raise ConfigError(
            f"data.text_columns: {data.tokenizer} was trained on {forms[len(schema.text_columns)]} "
            f"({', '.join(schema.text_columns)}), got {', '.join(chosen)}. Name as many columns, or another model"
        )
    return schema


def training_source(data: DataArguments, files: Files, exported: Schema | None) -> Source:
    """How the training file is read: as the arguments say, and as the exported model that is evaluated was trained."""
    if exported is None:
        source = make_source(data, files, data.text_columns, data.max_length, data.table.max_rows)
        return replace(source, windows=data.windows)
    columns, length = data.text_columns or exported.text_columns, min(data.max_length, exported.max_length)
    source = make_source(data, files, columns, length, data.table.max_rows)
    table = replace(data.table, labels=exported.labels or None)
    return replace(source, windows=windows_of(data, exported), table=table)


def windows_of(data: DataArguments, exported: Schema | None) -> WindowConfig:
    """Those of the exported model that is evaluated, with the options that are set in place of its own."""
    if exported is None:
        return data.windows
    own = {name: value for name, value in vars(data.windows).items() if value != getattr(NO_WINDOWS, name)}
    return replace(exported.windows, **own)


def _known_labels(data: DataArguments) -> tuple[str, ...]:
    """Those given, else of the training file, else of a checkpoint of transformers, else 0 and 1 for binary."""
    if data.task == "regression":
        return ()
    if data.table.labels is not None:
        return data.table.labels
    if data.train_file is not None:
        source = make_source(data, data.train_file, data.text_columns, data.max_length)
        options = {"label_column": source.label_column, "config": data.table, "max_rows": data.table.max_rows}
        table = read_table(source.files, source.text_columns, **options)  # type: ignore[arg-type]
        return fit_labels(table.labels or [], data.task, table.names, None, data.table.label_separator)
    if names := checkpoint_labels(data.tokenizer, data.task, data.revision, data.trust_remote_code):
        return names
    if data.task == "binary":
        log.info("label names are not known, 0 and 1 are used; data.table.labels sets them")
        return ("0", "1")
    raise ConfigError(
        "the names of the model's outputs are not known: set data.table.labels, or train_file, or use a "
        "folder exported by this program"
    )


def make_source(
    data: DataArguments,
    files: Files,
    text_columns: tuple[str, ...] | None,
    max_length: int,
    max_rows: int | None = None,
) -> Source:
    """Files, and how they are read and encoded.

    Args:
        data: the arguments.
        files: see `expand_files`. The rows of a query in FlagEmbedding's lines are a group, where none is named.
        text_columns: those to read; None: the texts of FlagEmbedding's lines, else text_a and text_b.
        max_length: the requested limit in tokens.
        max_rows: keep only the first rows; None: all.
    """
    tokenizer = TokenizerKey(data.tokenizer, data.revision, data.trust_remote_code, stamp(data.tokenizer))
    folder = str(default_cache_dir() if data.cache_dir is None else Path(data.cache_dir).expanduser())
    group = data.group_column
    if has_pairs(files, data.table):
        text_columns = text_columns or PAIR_COLUMNS[:2]
        group = PAIR_COLUMNS[0] if group is None else group
    named = files if isinstance(files, str | Path) else tuple(files)
    columns = (text_columns or TEXT_COLUMNS, data.label_column, group)
    return Source(
        *(named, stamp_of_files(files), *columns, data.table, max_rows, tokenizer, max_length, folder),
        cache_gb=data.cache_gb,
    )
