"""Labels of files to numbers."""

import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lightning_bge.data.tables.label_checks import (
    check_known_zeros_and_ones,
    check_label_lists,
    check_zeros_and_ones,
    separator_of_known,
)
from lightning_bge.data.tables.label_lists import SEPARATOR, is_list, label_key, label_lists
from lightning_bge.data.tables.readers import RowNames
from lightning_bge.errors import ConfigError, DataError
from lightning_bge.runtime.log_once import log_once
from lightning_bge.types import Schema, Task

log = logging.getLogger(__name__)

# Where the known names come from
Origin = Literal["data.table.labels", "the training file", "the model"]
POSITIVE = frozenset({"true", "yes", "positive", "entailment", "pos", "y", "t"})
NEGATIVE = frozenset({"false", "no", "negative", "neg", "nein", "non", "нет", "否"})
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
            Two labels are in the order of `positive_last`. Of several ways to write a label, such as 1 and True, the
            most frequent one is its name.
        separator: stands between the labels of a multi-label string: see `label_lists`.

    Returns:
        Names in the order of the model's outputs; binary: (negative, positive); regression: ().

    Raises:
        DataError: a label is missing, all rows have the same, binary has more than two or multi-label one alone, or
            multi-label cells seem to hold several labels, or zeros and ones (`check_label_lists`).
        ConfigError: `names` does not fit the task.
    """
    if task == "regression":
        values = _numbers(raw, where)
        if values.min() == values.max():
            raise DataError(f"all {len(values)} training labels are {values[0]:g}: there is nothing to learn")
        return ()
    rows = _row_labels(raw, task, where, separator)
    fields = _fields(raw) if task == "multilabel" else []
    found = fields or _names(rows)
    if task == "multilabel" and names is None:
        check_label_lists(raw, rows, separator, where)
    elif task == "multilabel":
        check_zeros_and_ones([labels for value, labels in zip(raw, rows, strict=True) if not fields], where)
    _check_number(found, task, names)
    _warn_of_names(found, where)
    if task != "multilabel":
        _warn_of_several(found, where)
    if names is None:
        return tuple(fields) or _in_order(found, task)
    distinct = len({label_key(name) for name in names}) == len(names) >= 2
    if not distinct or (task == "binary" and len(names) != 2):
        raise ConfigError(f"data.table.labels must hold two or more distinct names (binary: two), got {_show(names)}")
    _warn_of_unused(names, found, where)
    return tuple(names)


def encode_labels(
    raw: Sequence[Any],
    names: Sequence[str],
    task: Task,
    where: RowNames,
    separator: str | None = None,
    origin: Origin = "data.table.labels",
) -> np.ndarray:
    """Labels as numbers.

    Args:
        raw: one raw label a row; multi-label: see `label_lists`.
        names: the known names, from `fit_labels`.
        task: what the labels mean.
        where: the rows' names, for messages.
        separator: stands between the labels of a multi-label string: see `label_lists`.
        origin: where the names come from, for messages.

    Returns:
        binary and regression float32 [N], multi-class int64 [N], multi-label float32 [N, L].

    Raises:
        DataError: a label is missing, unknown, or (regression) not a finite number.
    """
    if task == "regression":
        return _numbers(raw, where)
    found = _row_labels(raw, task, where, separator)
    if task == "multilabel":
        check_known_zeros_and_ones(found, where)
    rows = [[label_key(label) for label in labels] for labels in found]
    index = {label_key(name): position for position, name in enumerate(names)}
    unknown = [(row, key) for row, keys in enumerate(rows) for key in keys if key not in index]
    if unknown:
        if task == "multilabel":
            check_zeros_and_ones(found, where)
        remedy = _remedy(unknown[0][1], rows, names, task, origin)
        raise DataError(
            f"{where}: label {unknown[0][1]!r} ({where.rows([row for row, _ in unknown])}) "
            f"is not among the known labels {_show(names)} of {origin}: {remedy}"
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
    wrong = [row for row, value in enumerate(raw) if is_list(value) or isinstance(value, Mapping)]
    if wrong:
        holds, first = "holds" if len(wrong) == 1 else "hold", raw[wrong[0]]
        if isinstance(first, Mapping):
            raise DataError(
                f"{where}: {where.rows(wrong)} {holds} an object with fields, such as {str(dict(first))[:60]}, and no "
                f"label: write the label alone into the column, or set the task to multilabel if each field is a label "
                "with true or false"
            )
        raise DataError(f"{where}: {where.rows(wrong)} {holds} a list of labels: set the task to multilabel")
    missing = [row for row, value in enumerate(raw) if value is None or value != value or not str(value).strip()]
    if missing:
        raise DataError(
            f"{where}: the label is missing in {len(missing)} of {len(raw)} rows ({where.rows(missing)}): "
            "fill in or drop these rows"
        )
    return [[value] for value in raw]


def _fields(raw: Sequence[Any]) -> list[str]:
    """The names of labels where each row says which of them apply; empty: the rows do not."""
    if not all(isinstance(value, Mapping) for value in raw):
        return []
    found: dict[str, str] = {}
    for value in raw:
        for name in value:
            found.setdefault(label_key(name), str(name))
    return list(found.values())


def _check_number(found: Sequence[str], task: Task, names: Sequence[str] | None) -> None:
    if not found:
        raise DataError(f"the training rows have no label at all; {task} needs at least 2")
    if task == "multilabel":
        if names is None and len(found) < 2:
            raise DataError(
                f"the training rows have one label only, {found[0]!r}; multilabel needs at least 2: set the task to "
                "binary, with another label such as 'no' in the rows that lack it"
            )
        return
    if len(found) < 2:
        raise DataError(f"the training rows have one class only, {found[0]!r}; {task} needs at least 2")
    if task == "binary" and len(found) > 2:
        raise DataError(
            f"task binary needs two labels, the training rows have {len(found)}: {_show(found)}. "
            "Set the task to multiclass"
        )


def _remedy(label: str, rows: list[list[str]], names: Sequence[str], task: Task, origin: Origin) -> str:
    """What to do about an unknown label."""
    keys = [label_key(name) for name in names]
    separator = separator_of_known(label, keys) if task == "multilabel" else None
    if separator is not None:
        return f"it seems to hold several of them, set data.table.label_separator to {separator!r}"
    numbers = {key for row in rows for key in row}
    if numbers <= {str(number) for number in range(len(names))} and not any(map(str.isdigit, keys)):
        shown = ", ".join(f"{name!r} for {number}" for number, name in enumerate(names[:3]))
        own = ", or set data.table.labels to these numbers" if origin == "data.table.labels" else ""
        return f"write the names for the numbers into the file ({shown}, ... if they are in this order){own}"
    return {
        "data.table.labels": "correct the rows, or add it to data.table.labels",
        "the training file": "correct the rows, or add some with this label to the training file",
        "the model": "correct the rows, or leave them out",
    }[origin]


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
        first = raw[wrong[0]]
        has = f"has {first!r}" if len(wrong) == 1 else f"have none, the first of them {first!r}"
        fix = "correct or drop these rows"
        if isinstance(first, str) and re.search(r"\d", first) and re.search(r"[,%'\s]", first.strip()):
            fix = "write numbers with a decimal point, without % and without separators of thousands"
        raise DataError(f"{where}: regression needs a finite number in every row, {where.rows(wrong)} {has}: {fix}")
    return numbers


def positive_last(names: Sequence[str]) -> tuple[str, ...]:
    """Two names of classes as (negative, positive): numbers ascending, else by words for yes and no.

    A name is a yes where it is in `POSITIVE`, a no where it is in `NEGATIVE` or is the other one behind `not`, `non` or
    `no` (`not spam`, `non-toxic`). Where the names do not say it, their order stays.
    """
    try:
        return tuple(sorted(names, key=float))
    except ValueError:
        first, second = (_polarity(name, other) for name, other in (names, names[::-1]))
        return tuple(names[::-1] if first > second else names)


def _polarity(name: str, other: str) -> int:
    """1 for a yes, -1 for a no, else 0."""
    name, other = name.strip().casefold(), other.strip().casefold()
    no = name in NEGATIVE or re.fullmatch(rf"(not|non|no)[\s_-]*{re.escape(other)}", name) is not None
    return int(name in POSITIVE) - int(no)


def _in_order(names: Sequence[str], task: Task) -> tuple[str, ...]:
    try:
        ordered = sorted(names, key=float)
    except ValueError:
        ordered = sorted(names)
    return positive_last(ordered) if task == "binary" else tuple(ordered)


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


def _warn_of_several(names: Sequence[str], where: RowNames) -> None:
    """Warn once of a class that seems to be several labels."""
    several = next((name for name in names if len([part for part in name.split(SEPARATOR) if part.strip()]) > 1), None)
    if several is not None:
        text = f"{where}: the label {several!r} is learnt as one class"
        log_once(log, logging.WARNING, f"{text}; if it is several labels, set the task to multilabel")


def _warn_of_unused(names: Sequence[str], found: Sequence[str], where: RowNames) -> None:
    keys = {label_key(name) for name in found}
    unused = [name for name in names if label_key(name) not in keys]
    if unused and len(unused) < len(names):  # else each row's label is refused
        text = f"{where}: no row has the label {_show(unused)} of data.table.labels, which can't be learnt"
        log_once(log, logging.WARNING, text)


def _show(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name if len(name) <= 40 else f"{name[:40]}...") for name in names[:10])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > 10 else shown
