"""The labels of one row of a multi-label task, from a cell, a list, or one column for each label."""

import ast
import json
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lightning_bge.data.tables.readers import RowNames
from lightning_bge.data.tables.rows import LabelColumns, whole_number
from lightning_bge.errors import DataError

SEPARATOR = "|"
_BRACKETS = {"[": "]", "(": ")", "{": "}"}
_CALL = r"[A-Za-z_][\w.]*\((\s*[\[({].*)?\)"  # array(['a', 'b'], dtype=object), set()
_YES = frozenset({"1", "yes", "y", "t", "x"})
_NO = frozenset({"0", "no", "n", "f", "-"})


def label_key(value: Any) -> str:
    """What labels are compared by: 1, 1.0, "1", "1.0", True and "true" are all `1`, -0.0 is `0`.

    Others are their text without blanks around it, in the composed form of Unicode (NFC).
    """
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = whole_number(unicodedata.normalize("NFC", str(value).strip()))
    return {"true": "1", "false": "0", "-0": "0", "+0": "0"}.get(text.lower(), text)


def label_lists(raw: Sequence[Any], separator: str | None, where: RowNames) -> list[list[Any]]:
    """The labels of each row, as they stand there.

    Args:
        raw: for each row a list, a string, or a dict from each label's name to whether it applies; a name that a
            row's dict lacks does not apply.
        separator: stands between the labels of a string. None: strings that are lists of Python or JSON are read as
            such, others are split at `|`.
        where: the rows' names, for messages.

    Raises:
        DataError: a label is missing, or a list can't be read.
    """
    missing = [row for row, value in enumerate(raw) if value is None]
    if missing:
        raise DataError(
            f"{where}: the labels are missing in {len(missing)} of {len(raw)} rows ({where.rows(missing)}): "
            "fill in or drop these rows; a row without labels has an empty cell or list"
        )
    return [_labels(value, separator, where, row) for row, value in enumerate(raw)]


def is_list(value: Any) -> bool:
    """Whether a label is a list, or a string that holds one."""
    if isinstance(value, str):
        return _parsed(value.strip()) is not None
    return isinstance(value, list | tuple | set)


def _labels(value: Any, separator: str | None, where: RowNames, row: int) -> list[Any]:
    if isinstance(value, LabelColumns):
        return [name for name, applies in value.items() if _applies(applies, f"column {name!r}", where, row)]
    if isinstance(value, Mapping):  # Parquet fills in null for a field that a row lacks
        there = {name: applies for name, applies in value.items() if applies is not None}
        return [name for name, applies in there.items() if _applies(applies, f"the field {name!r}", where, row)]
    if isinstance(value, list | tuple | set):
        _check_elements(value, where, row)
        return [label for label in value if label is not None and label == label]  # NaN is missing too
    text = str(value).strip()
    listed = _BRACKETS.get(text[:1]) == text[-1:] != "" or re.fullmatch(_CALL, text, re.DOTALL)
    if separator is None and isinstance(value, str) and listed:
        parsed = _parsed(text)
        if parsed is None:
            raise DataError(
                f"{where}: {where.rows([row])} has {text[:60]!r}, which seems to be a list, "
                f"but not one of Python or JSON. Write ['a', 'b'] or a{SEPARATOR}b, or set data.table.label_separator"
            )
        return parsed
    return [label for label in text.split(SEPARATOR if separator is None else separator) if label.strip()]


def _check_elements(labels: Collection[Any], where: RowNames, row: int) -> None:
    wrong = next((label for label in labels if isinstance(label, Mapping | list | tuple | set | bytes)), None)
    if wrong is not None:
        raise DataError(
            f"{where}: {where.rows([row])} has a list of labels with {str(wrong)[:60]!r}, a {type(wrong).__name__}. "
            'Write the names of the labels alone, such as ["a", "b"]'
        )


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
        f"{where}: {name} must hold 1 or 0 (yes or no, true or false) in each row, {where.rows([row])} has {value!r}"
    )
