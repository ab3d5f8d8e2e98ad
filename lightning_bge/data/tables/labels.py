"""Labels of files to numbers."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_bge.data.tables.readers import first_rows
from lightning_bge.errors import ConfigError, DataError
from lightning_bge.types import Task

POSITIVE = frozenset({"1", "true", "yes", "positive", "entailment", "pos", "y", "t"})


def label_name(value: Any) -> str:
    """The name of a raw label, the same for CSV text and for typed columns: 1, 1.0 and "1" are all `1`."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def fit_labels(
    raw: Sequence[Any], task: Task, names: Sequence[str] | None = None, separator: str = "|"
) -> tuple[str, ...]:
    """Find the label names of a training set.

    Args:
        raw: one raw label a row; multi-label: a list, or a string with names between separators.
        task: what the labels mean.
        names: the names in the wanted order; None: those found, in sorted order (as numbers where all are numbers).
            Of two labels the one in `POSITIVE` comes last.
        separator: stands between the labels of a multi-label string.

    Returns:
        Names in the order of the model's outputs; binary: (negative, positive); regression: ().

    Raises:
        DataError: a label is missing, all rows have the same, or binary has more than two.
        ConfigError: `names` does not fit the task.
    """
    if task == "regression":
        values = encode_labels(raw, (), task, "training labels")
        if values.min() == values.max():
            raise DataError(f"all {len(values)} training labels are {values[0]:g}: there is nothing to learn")
        return ()
    counts = Counter(name for row in _row_names(raw, task, "training labels", separator) for name in row)
    if not counts or (task != "multilabel" and len(counts) < 2):
        found = f"one class only, {next(iter(counts))!r}" if counts else "no label at all"
        raise DataError(f"the training rows have {found}; {task} needs at least {1 if task == 'multilabel' else 2}")
    if task == "binary" and len(counts) > 2:
        raise DataError(
            f"task binary needs two labels, the training rows have {len(counts)}: {_show(list(counts))}. "
            "Set the task to multiclass"
        )
    if names is None:
        return _sorted_names(counts, task)
    if len(set(names)) != len(names) or (task == "binary" and len(names) != 2):
        raise ConfigError(f"data.table.labels must hold distinct names (binary: two), got {_show(names)}")
    return tuple(names)


def encode_labels(raw: Sequence[Any], names: Sequence[str], task: Task, where: str, separator: str = "|") -> np.ndarray:
    """Labels as numbers.

    Args:
        raw: one raw label a row.
        names: the known names, from `fit_labels`.
        task: what the labels mean.
        where: the file, for error messages.
        separator: stands between the labels of a multi-label string.

    Returns:
        binary and regression float32 [N], multi-class int64 [N], multi-label float32 [N, L].

    Raises:
        DataError: a label is missing, unknown, or (regression) not a finite number.
    """
    if task == "regression":
        return _numbers(raw, where)
    rows = _row_names(raw, task, where, separator)
    index = {name: position for position, name in enumerate(names)}
    unknown = [(row, name) for row, row_names in enumerate(rows) for name in row_names if name not in index]
    if unknown:
        raise DataError(
            f"{where}: label {unknown[0][1]!r} ({first_rows([row for row, _ in unknown])}, the first data row is 1) "
            f"is not among the known labels {_show(names)}: fix the rows, or add them to the training file"
        )
    if task == "multilabel":
        encoded = np.zeros((len(rows), len(names)), dtype=np.float32)
        for row, row_names in enumerate(rows):
            encoded[row, [index[name] for name in row_names]] = 1.0
        return encoded
    dtype = np.float32 if task == "binary" else np.int64
    return np.array([index[row_names[0]] for row_names in rows], dtype=dtype)


def _row_names(raw: Sequence[Any], task: Task, where: str, separator: str) -> list[list[str]]:
    if task == "multilabel":
        _refuse_missing([row for row, value in enumerate(raw) if value is None], len(raw), where)
        # An empty cell or list is a row to which no label applies.
        lists = (value if isinstance(value, list | tuple) else str(value).split(separator) for value in raw)
        return [[name for name in map(label_name, values) if name] for values in lists]
    wrong = [row for row, value in enumerate(raw) if isinstance(value, list | tuple | dict)]
    if wrong:
        raise DataError(f"{where}: {first_rows(wrong)} holds a list of labels: set the task to multilabel")
    missing = [row for row, value in enumerate(raw) if value is None or value != value or not label_name(value)]
    _refuse_missing(missing, len(raw), where)
    return [[label_name(value)] for value in raw]


def _numbers(raw: Sequence[Any], where: str) -> np.ndarray:
    values = np.empty(len(raw), dtype=np.float64)
    for row, value in enumerate(raw):
        try:
            values[row] = float(value)
        except (TypeError, ValueError):
            values[row] = math.nan
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, and is refused
        numbers = values.astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(numbers)).tolist()
    if wrong:
        raise DataError(
            f"{where}: regression needs a finite number in every row, {first_rows(wrong)} (the first data row is 1) "
            f"has {raw[wrong[0]]!r}"
        )
    return numbers


def _refuse_missing(rows: list[int], total: int, where: str) -> None:
    if rows:
        raise DataError(
            f"{where}: the label is missing in {len(rows)} of {total} rows ({first_rows(rows)}, the first data row "
            "is 1): fill in or drop these rows"
        )


def _sorted_names(names: Counter[str], task: Task) -> tuple[str, ...]:
    try:
        ordered = sorted(names, key=float)
    except ValueError:
        ordered = sorted(names)
    if task == "binary":
        first, second = (name.lower() in POSITIVE for name in ordered)
        if first and not second:
            ordered.reverse()
    return tuple(ordered)


def _show(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:10])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > 10 else shown
