"""Checks of multi-label cells and lists that would be learnt wrongly in silence."""

import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lightning_bge.data.tables.label_lists import SEPARATOR, is_list, label_key
from lightning_bge.data.tables.readers import RowNames
from lightning_bge.errors import DataError
from lightning_bge.runtime.log_once import log_once

log = logging.getLogger(__name__)

LIST_SEPARATORS = (",", ";", "\t", "\n", "/", "，", "；", "、")  # noqa: RUF001
NAME_SEPARATORS = ("&", "+", " ")  # that stand in names as well


def check_label_lists(raw: Sequence[Any], found: Sequence[list[Any]], separator: str | None, where: RowNames) -> None:
    """Check that the labels of a multi-label training set are labels, and not several in one or zeros and ones.

    Args:
        raw: as in `label_lists`.
        found: what `label_lists` has made of them.
        separator: the one that is set; None: none, and other characters that seem to separate labels are refused.
        where: the rows' names, for messages.

    Raises:
        DataError: cells seem to hold several labels, or zeros and ones.
    """
    rows = [(value, labels) for value, labels in zip(raw, found, strict=True) if not isinstance(value, Mapping)]
    check_zeros_and_ones([labels for _, labels in rows], where)
    if separator is None:
        _check_separator(rows, where)
    elif separator != SEPARATOR and not any(isinstance(value, str) and separator in value for value, _ in rows):
        text = f"{where}: no cell has the separator {separator!r} of data.table.label_separator"
        log_once(log, logging.WARNING, text)
    piped = next((label for _, labels in rows for label in labels if SEPARATOR in str(label)), None)
    if piped is not None:
        text = f"{where}: the label {piped!r} contains {SEPARATOR!r}, by which predicted labels are joined"
        log_once(log, logging.WARNING, f"{text}: rename it, or read the columns score:<label> of predictions")


def check_zeros_and_ones(found: Sequence[list[Any]], where: RowNames) -> None:
    """Refuse lists such as [1, 0, 1] and cells such as 1,0,1, `1 0 1` or 101: a number from 0 to 1 for each label.

    Raises:
        DataError: all rows are such lists, of one length.
    """
    rows = [labels for labels in found if labels]
    texts = [labels[0].strip() if len(labels) == 1 and isinstance(labels[0], str) else "" for labels in rows]
    digits = all(re.fullmatch("[01]{2,}", text) for text in texts)
    if digits and texts and not (len(texts[0]) > 2 or any(text.startswith("0") for text in texts)):
        return  # numbers such as 10 and 11
    width, kind, says = 0, "zeros and ones", "whether it applies"
    for labels, text in zip(rows, texts, strict=True):
        values = list(text) if digits else _split_cell(text) if text else labels
        width = width or len(values)
        if len(values) != width or width < 2 or not all(_is_share(value) for value in values):
            return
        if not all(float(label_key(value)) in (0, 1) for value in values):
            kind, says = "numbers from 0 to 1", "how much it applies"
    if not rows:
        return
    example = f"cells such as {texts[0][:60]!r}" if texts[0] else f"lists such as {str(rows[0])[:60]}"
    raise DataError(
        f"{where}: {example} seem to hold {kind}, which say for each label {says}. Give each label a column of its own "
        "with 1 or 0 and name these columns in data.label_column, or write the names of those that apply; do not set "
        "data.table.label_separator"
    )


def check_known_zeros_and_ones(found: Sequence[list[Any]], where: RowNames) -> None:
    """As `check_zeros_and_ones`, where 0 and 1 may be known labels: only lists that have one of them twice.

    Raises:
        DataError: all rows are such lists, of one length.
    """
    if any(len(labels) > len(set(map(label_key, labels))) for labels in found):
        check_zeros_and_ones(found, where)


def separator_of_known(label: str, known: Collection[str]) -> str | None:
    """The character that divides a label into known ones; None: there is none.

    Args:
        label: its key.
        known: the keys of the known labels.
    """
    for separator in (SEPARATOR, *LIST_SEPARATORS, *NAME_SEPARATORS):
        parts = _parts(label, separator)
        if len(parts) > 1 and all(part in known for part in parts):
            return separator
    return None


def _split_cell(text: str) -> list[str]:
    return [part for part in re.split(r"[\s,;/|&+]+", text.strip("[](){} ")) if part]


def _is_share(value: Any) -> bool:
    try:
        return 0 <= float(label_key(value)) <= 1
    except ValueError:
        return False


def _parts(cell: str, separator: str) -> list[str]:
    return [label_key(part) for part in cell.split(separator) if part.strip()]


def _check_separator(rows: Sequence[tuple[Any, list[Any]]], where: RowNames) -> None:
    """Refuse cells whose labels another character than `|` separates; warn where it may stand in names."""
    single = all(len(labels) < 2 for _, labels in rows)  # no row has two labels
    cells = list(
        dict.fromkeys(
            label.strip()
            for value, labels in rows
            if single or (isinstance(value, str) and not is_list(value))
            for label in labels
            if isinstance(label, str)
        )
    )
    tagged = next((cell for cell in cells if re.fullmatch(r"(<[^<>]+>\s*){2,}", cell)), None)
    if tagged is not None:
        raise DataError(f"{where}: cells such as {tagged[:60]!r} seem to hold several labels. Write a{SEPARATOR}b")
    labels = {label_key(label) for _, of_row in rows for label in of_row}
    for separator in (*LIST_SEPARATORS, *NAME_SEPARATORS):
        joined = {cell: parts for cell in cells if separator in cell and (parts := _parts(cell, separator))}
        if separator in NAME_SEPARATORS:
            joined = {cell: parts for cell, parts in joined.items() if len(parts) > 1}  # not C++
        if not joined:
            continue
        example = next(iter(joined))[:60]
        if _separates(separator, joined, cells, labels, single):
            raise DataError(
                f"{where}: cells such as {example!r} seem to hold several labels between {separator!r}. Set "
                f"data.table.label_separator to {separator!r}; to {SEPARATOR!r} if each cell is one label"
            )
        if single:
            text = f"{where}: no row has two labels: a cell such as {example!r} is learnt as one label"
            fix = f"set data.table.label_separator to {separator!r} if it holds several, to {SEPARATOR!r} if not"
            log_once(log, logging.WARNING, f"{text}; {fix}")


def _separates(
    separator: str, joined: Mapping[str, list[str]], cells: Sequence[str], labels: Collection[str], single: bool
) -> bool:
    """Whether a character separates labels, by the parts of the cells that hold it."""
    parts = Counter(part for of_cell in joined.values() for part in set(of_cell))
    again = any(part in labels for part in parts)
    if separator in LIST_SEPARATORS:
        return single or again or any(count > 1 for count in parts.values())
    if single:
        return again or len({part for cell in cells for part in _parts(cell, separator)}) < len(cells)
    return any(all(part in labels for part in of_cell) for of_cell in joined.values())
