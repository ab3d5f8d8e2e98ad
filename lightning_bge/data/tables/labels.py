"""Labels of files to numbers."""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_bge.data.tables.label_lists import is_list, label_key, label_lists
from lightning_bge.data.tables.readers import RowNames
from lightning_bge.errors import ConfigError, DataError
from lightning_bge.runtime.log_once import log_once
from lightning_bge.types import Schema, Task

log = logging.getLogger(__name__)

POSITIVE = frozenset({"true", "yes", "positive", "entailment", "pos", "y", "t"})
SEEM_MISSING = frozenset({"nan", "none", "null", "na", "n/a", "#n/a", "nat", "<na>"})


def fit_labels(
    raw: Sequence[Any], task: Task, where: RowNames, names: Sequence[str] | None = None, separator: str | None = None
) -> tuple[str, ...]:
    """Find the label names of a training set.

    Args:
        raw: one raw label a row; multi-label: see `label_lists`.
        task: what the labels mean.
        where: the rows' names, for messages.
        names: the names in the wanted order; None: those found, in sorted order (as numbers where all are numbers).
            Of two labels the one in `POSITIVE` comes last. Of several ways to write a label, such as 1 and True, the
            most frequent one is its name.
        separator: stands between the labels of a multi-label string: see `label_lists`.

    Returns:
        Names in the order of the model's outputs; binary: (negative, positive); regression: ().

    Raises:
        DataError: a label is missing, all rows have the same, or binary has more than two.
        ConfigError: `names` does not fit the task.
    """
    if task == "regression":
        values = _numbers(raw, where)
        if values.min() == values.max():
            raise DataError(f"all {len(values)} training labels are {values[0]:g}: there is nothing to learn")
        return ()
    columns = task == "multilabel" and bool(raw) and isinstance(raw[0], dict)  # one for each label
    found = list(raw[0]) if columns else _names(_row_labels(raw, task, where, separator))
    if not found or (task != "multilabel" and len(found) < 2):
        got = f"one class only, {found[0]!r}" if found else "no label at all"
        raise DataError(f"the training rows have {got}; {task} needs at least {1 if task == 'multilabel' else 2}")
    if task == "binary" and len(found) > 2:
        raise DataError(
            f"task binary needs two labels, the training rows have {len(found)}: {_show(found)}. "
            "Set the task to multiclass"
        )
    _warn_of_names(found, where)
    if names is None:
        return tuple(found) if columns else _in_order(found, task)
    if len({label_key(name) for name in names}) != len(names) or (task == "binary" and len(names) != 2):
        raise ConfigError(f"data.table.labels must hold distinct names (binary: two), got {_show(names)}")
    _warn_of_unused(names, found, where)
    return tuple(names)


def encode_labels(
    raw: Sequence[Any], names: Sequence[str], task: Task, where: RowNames, separator: str | None = None
) -> np.ndarray:
    """Labels as numbers.

    Args:
        raw: one raw label a row; multi-label: see `label_lists`.
        names: the known names, from `fit_labels`.
        task: what the labels mean.
        where: the rows' names, for messages.
        separator: stands between the labels of a multi-label string: see `label_lists`.

    Returns:
        binary and regression float32 [N], multi-class int64 [N], multi-label float32 [N, L].

    Raises:
        DataError: a label is missing, unknown, or (regression) not a finite number.
    """
    if task == "regression":
        return _numbers(raw, where)
    rows = [[label_key(label) for label in labels] for labels in _row_labels(raw, task, where, separator)]
    index = {label_key(name): position for position, name in enumerate(names)}
    unknown = [(row, key) for row, keys in enumerate(rows) for key in keys if key not in index]
    if unknown:
        raise DataError(
            f"{where}: label {unknown[0][1]!r} ({where.rows([row for row, _ in unknown])}) "
            f"is not among the known labels {_show(names)}: correct the rows, or add them to the training file"
        )
    if task == "multilabel":
        encoded = np.zeros((len(rows), len(names)), dtype=np.float32)
        for row, keys in enumerate(rows):
            encoded[row, [index[key] for key in keys]] = 1.0
        return encoded
    dtype = np.float32 if task == "binary" else np.int64
    return np.array([index[keys[0]] for keys in rows], dtype=dtype)


def count_classes(labels: np.ndarray, schema: Schema) -> np.ndarray | None:
    """Rows of each class: binary (negative, positive), multi-class [C], multi-label [L]; None for a regression.

    Args:
        labels: as `encode_labels` returns them.
        schema: task and label names.
    """
    if schema.task == "regression":
        return None
    if schema.task == "multilabel":
        return labels.sum(axis=0).astype(np.int64)
    return np.bincount(labels.astype(np.int64), minlength=len(schema.labels))


def _row_labels(raw: Sequence[Any], task: Task, where: RowNames, separator: str | None) -> list[list[Any]]:
    if task == "multilabel":
        return label_lists(raw, separator, where)
    wrong = [row for row, value in enumerate(raw) if is_list(value)]
    if wrong:
        raise DataError(f"{where}: {where.rows(wrong)} holds a list of labels: set the task to multilabel")
    missing = [row for row, value in enumerate(raw) if value is None or value != value or not str(value).strip()]
    if missing:
        raise DataError(
            f"{where}: the label is missing in {len(missing)} of {len(raw)} rows ({where.rows(missing)}): "
            "fill in or drop these rows"
        )
    return [[value] for value in raw]


def _names(rows: list[list[Any]]) -> list[str]:
    """The distinct labels, each as it is written most often."""
    written: dict[str, Counter[str]] = defaultdict(Counter)
    for labels in rows:
        for label in labels:
            key, text = label_key(label), str(label).strip()
            # 1.0 is written 1, but True stays True
            written[key][text if text.lower() in ("true", "false") else key] += 1
    return [min(forms, key=lambda form: (-forms[form], len(form), form)) for forms in written.values()]


def _numbers(raw: Sequence[Any], where: RowNames) -> np.ndarray:
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
            f"{where}: regression needs a finite number in every row, {where.rows(wrong)} has {raw[wrong[0]]!r}"
        )
    return numbers


def _in_order(names: Sequence[str], task: Task) -> tuple[str, ...]:
    try:
        ordered = sorted(names, key=float)
    except ValueError:
        ordered = sorted(names)
    if task == "binary":
        first, second = (name.lower() in POSITIVE for name in ordered)
        if first and not second:
            ordered.reverse()
    return tuple(ordered)


def _warn_of_names(names: Sequence[str], where: RowNames) -> None:
    """Warn once of names that are the same but for case or blanks, and of those that seem to be missing values."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike["".join(name.casefold().split())].append(name)
    for same in alike.values():
        if len(same) > 1:
            shown = " and ".join(map(repr, same))
            text = f"{where}: the labels {shown} differ by case or blanks alone, and are learnt as {len(same)} labels"
            log_once(log, logging.WARNING, f"{text}: correct the file if they are one")
    for name in names:
        if name.lower() in SEEM_MISSING:
            text = f"{where}: the label {name!r} is learnt as one; drop its rows if it stands for a missing one"
            log_once(log, logging.WARNING, text)


def _warn_of_unused(names: Sequence[str], found: Sequence[str], where: RowNames) -> None:
    keys = {label_key(name) for name in found}
    unused = [name for name in names if label_key(name) not in keys]
    if unused and len(unused) < len(names):  # else each row's label is refused
        text = f"{where}: no row has the label {_show(unused)} of data.table.labels, which can't be learnt"
        log_once(log, logging.WARNING, text)


def _show(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name if len(name) <= 40 else f"{name[:40]}...") for name in names[:10])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > 10 else shown
