"""What a data module's arguments say of a file: how it is read and encoded, and what the model's outputs mean."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from lightning_bge.data.checkpoint_labels import checkpoint_labels
from lightning_bge.data.encoded_file import Source, TokenizerKey, stamp, stamp_of_files
from lightning_bge.data.tables.config import TableConfig
from lightning_bge.data.tables.files import Files
from lightning_bge.data.tables.json_rows import PAIR_COLUMNS
from lightning_bge.data.tables.labels import fit_labels
from lightning_bge.data.tables.readers import has_pairs, read_table
from lightning_bge.errors import ConfigError
from lightning_bge.runtime.cache_dir import default_cache_dir
from lightning_bge.types import Schema, Task
from lightning_bge.windows import NO_WINDOWS, WindowConfig

log = logging.getLogger(__name__)

DEFAULT_TEXT_COLUMNS = ("text_a", "text_b")


class DataArguments(Protocol):
    """The arguments of `TextDataModule` that are needed here."""

    tokenizer: str
    revision: str | None
    trust_remote_code: bool
    task: Task
    train_file: str | list[str] | None
    text_columns: tuple[str, ...]
    label_column: str | tuple[str, ...]
    group_column: str | None
    max_length: int
    cache_dir: str | None
    cache_gb: float | None
    table: TableConfig
    windows: WindowConfig


def check_text_columns(data: DataArguments) -> None:
    """Raise `ConfigError` for single texts for a model of pairs, and pairs for a model of single texts."""
    schema = exported_schema(data)
    chosen = data.text_columns
    if schema is not None and chosen != DEFAULT_TEXT_COLUMNS and len(chosen) != len(schema.text_columns):
        forms = ("", "single texts", "pairs of texts")
        raise ConfigError(
            f"data.text_columns: {data.tokenizer} was trained on {forms[len(schema.text_columns)]} "
            f"({', '.join(schema.text_columns)}), got {', '.join(chosen)}. Name as many columns, or another model"
        )


def known_schema(data: DataArguments) -> Schema:
    """From the exported model's folder, else from the arguments and the training file.

    Raises:
        ConfigError: the names of the model's outputs are not known.
    """
    schema = exported_schema(data)
    if schema is not None:
        chosen = data.text_columns if data.text_columns != DEFAULT_TEXT_COLUMNS else schema.text_columns
        if schema.task != data.task:
            log.info("task %s of the exported model is used, not %s", schema.task, data.task)
        length, windows = min(data.max_length, schema.max_length), windows_of(data, schema)
        return replace(schema, text_columns=chosen, max_length=length, windows=windows)
    return Schema(data.task, _known_labels(data), data.text_columns, data.max_length, windows=data.windows)


def exported_schema(data: DataArguments) -> Schema | None:
    """That of the folder whose tokenizer is used, where it holds an exported model."""
    return Schema.load(Path(data.tokenizer).expanduser()) if data.tokenizer else None


def windows_of(data: DataArguments, exported: Schema | None) -> WindowConfig:
    """Those that were set, else those of the exported model that is evaluated."""
    return data.windows if exported is None or data.windows != NO_WINDOWS else exported.windows


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
    data: DataArguments, files: Files, text_columns: tuple[str, ...], max_length: int, max_rows: int | None = None
) -> Source:
    """Files, and how they are read and encoded.

    Args:
        data: the arguments.
        files: see `expand_files`. Of FlagEmbedding's lines the texts and the group go by the names of their columns.
        text_columns: those to read.
        max_length: the requested limit in tokens.
        max_rows: keep only the first rows; None: all.
    """
    tokenizer = TokenizerKey(data.tokenizer, data.revision, data.trust_remote_code, stamp(data.tokenizer))
    folder = str(default_cache_dir() if data.cache_dir is None else Path(data.cache_dir).expanduser())
    group = data.group_column
    if has_pairs(files, data.table):
        text_columns = PAIR_COLUMNS[:2] if text_columns == DEFAULT_TEXT_COLUMNS else text_columns
        group = PAIR_COLUMNS[0] if group is None else group
    named = files if isinstance(files, str | Path) else tuple(files)
    return Source(
        *(named, stamp_of_files(files), text_columns, data.label_column, group, data.table, max_rows, tokenizer),
        *(max_length, folder),
        cache_gb=data.cache_gb,
    )
