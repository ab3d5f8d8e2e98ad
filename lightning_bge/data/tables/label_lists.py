"""The labels of one row of a multi-label task, from a cell, a list, or one column for each label."""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_bge.data.tables.readers import RowNames
from lightning_bge.errors import DataError

SEPARATOR = "|"
_OTHER_SEPARATORS = (",", ";", "\t", "/")
_BRACKETS = {"[": "]", "(": ")", "{": "}"}
_YES = frozenset({"1", "yes", "y", "t", "x"})
_NO = frozenset({"0", "no", "n", "f", "-"})


def label_key(value: Any) -> str:
    """What labels are compared by: 1, 1.0, "1", "1.0", True and "true" are all `1`; else the text without blanks."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value).strip()
    if re.fullmatch(r"[+-]?\d+\.0*", text):
        return text.partition(".")[0]
    return {"true": "1", "false": "0"}.get(text.lower(), text)


def label_lists(raw: Sequence[Any], separator: str | None, where: RowNames) -> list[list[Any]]:
    """The labels of each row, as they stand there.

    Args:
        raw: for each row a list, a string, or a dict from each label's name to whether it applies.
        separator: stands between the labels of a string. None: strings that are lists of Python or JSON are read as
            such, others are split at `|`, and those that another character seems to separate are refused.
        where: the rows' names, for messages.

    Raises:
        DataError: a label is missing, a list can't be read, or another separator is in use.
    """
    missing = [row for row, value in enumerate(raw) if value is None]
    if missing:
        raise DataError(
            f"{where}: the labels are missing in {len(missing)} of {len(raw)} rows ({where.rows(missing)}): "
            "fill in or drop these rows; a row without labels has an empty cell or list"
        )
    found = [_labels(value, separator, where, row) for row, value in enumerate(raw)]
    if separator is None:
        _check_separator([value for value in raw if isinstance(value, str)], where)
        _check_zeros_and_ones(found, where)
    return found


def is_list(value: Any) -> bool:
    """Whether a label is a list, or a string that holds one."""
    if isinstance(value, str):
        return _parsed(value.strip()) is not None
    return isinstance(value, list | tuple | set | dict)


def _labels(value: Any, separator: str | None, where: RowNames, row: int) -> list[Any]:
    if isinstance(value, Mapping):
        return [name for name, applies in value.items() if _applies(applies, name, where, row)]
    if isinstance(value, list | tuple | set):
        return [label for label in value if label is not None]
    text = str(value).strip()
    if separator is None and isinstance(value, str) and _BRACKETS.get(text[:1]) == text[-1:] != "":
        parsed = _parsed(text)
        if parsed is None:
            raise DataError(
                f"{where}: {where.rows([row])} has {text[:60]!r}, which seems to be a list, "
                f"but not one of Python or JSON. Write ['a', 'b'] or a{SEPARATOR}b, or set data.table.label_separator"
            )
        return parsed
    return [label for label in text.split(SEPARATOR if separator is None else separator) if label.strip()]


def _parsed(text: str) -> list[Any] | None:
    """A list of Python or JSON; None: the text is not a list."""
    if _BRACKETS.get(text[:1]) != text[-1:] or len(text) < 2:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            return None
        # Python joins strings that stand side by side, as NumPy prints them: ['a' 'b']
        if isinstance(found, list | tuple | set) and re.search(r"""['"]\s+['"]""", text):
            return None
    if isinstance(found, str | int | float | bool):  # a single label in round brackets
        return [found]
    flat = isinstance(found, list | tuple | set) and not any(isinstance(one, list | tuple | dict) for one in found)
    return [label for label in found if label is not None] if flat else None


def _applies(value: Any, name: str, where: RowNames, row: int) -> bool:
    key = "" if value is None else label_key(value).lower()
    if key in _YES or key in _NO:
        return key in _YES
    raise DataError(
        f"{where}: column {name!r} must hold 1 or 0 (yes or no, true or false) in each row, {where.rows([row])} "
        f"has {value!r}"
    )


def _check_separator(cells: list[str], where: RowNames) -> None:
    """Refuse cells whose labels another character than `|` separates."""
    if any(SEPARATOR in cell for cell in cells):
        return
    texts = [cell.strip() for cell in cells if cell.strip() and _parsed(cell.strip()) is None]
    for other in _OTHER_SEPARATORS:
        joined = [text for text in texts if other in text]
        if not joined:
            continue
        parts = [part.strip() for text in texts for part in text.split(other)]
        # a comma that belongs to a name does not make fewer names of more
        if len(set(parts)) < len(set(texts)) or set(texts) - set(joined) >= {part for part in parts if part}:
            raise DataError(
                f"{where}: cells such as {joined[0][:60]!r} seem to hold several labels between {other!r}. Set "
                f"data.table.label_separator to {other!r}; to {SEPARATOR!r} if each cell is one label"
            )


def _check_zeros_and_ones(found: list[list[Any]], where: RowNames) -> None:
    """Refuse lists such as [1, 0, 1], which say for each label whether it applies."""
    lengths = {len(labels) for labels in found}
    keys = {label_key(label) for labels in found for label in labels}
    if keys == {"0", "1"} and len(lengths) == 1 and any(len(set(map(str, labels))) < len(labels) for labels in found):
        raise DataError(
            f"{where}: lists such as {found[0]} say for each label whether it applies. Give each label a column of its "
            "own and name these columns in data.label_column, or write the names of those that apply"
        )
