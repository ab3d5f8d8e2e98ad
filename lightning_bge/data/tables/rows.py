"""The columns of some rows, and the names of columns."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_bge.errors import DataError

Columns = dict[str, list[Any]]  # the values of each column, of some rows of a file; None is a missing one


class LabelColumns(dict[str, Any]):
    """The labels of a row that have a column each: whether each label applies."""


def whole_number(text: str) -> str:
    """`3` for `3.0`, as one file may have 3 and another one 3.0; any other text as it is."""
    return text.partition(".")[0] if re.fullmatch(r"[+-]?\d+\.0*", text) else text


HEADER = "Its first line must name the columns"


def check_names(
    names: Sequence[str], known: Sequence[str], path: Path | str, form: str = "", header: str = HEADER
) -> None:
    """Raise `DataError` where a file lacks a column, or has two of that name.

    Args:
        names: the columns that are asked for.
        known: those of the file.
        path: the file.
        form: how it was read, for the message.
        header: where the names of the columns stand in such a file, for the message.
    """
    missing = [name for name in names if name not in known]
    if missing:
        near = difflib.get_close_matches(missing[0].strip().lower(), [name.strip().lower() for name in known], n=1)
        similar = [name for name in known if name.strip().lower() in near]
        hint = f" (did you mean {similar[0]!r}?)" if similar else ""
        read = f", read with {form}" if form else ""
        raise DataError(
            f"data file {path} has no column {', '.join(map(repr, missing))}{hint}; its columns are "
            f"{', '.join(map(repr, known[:20]))}{', ...' if len(known) > 20 else ''}{read}. {header}: "
            "set data.text_columns, data.label_column or data.group_column"
        )
    twice = [name for name in names if list(known).count(name) > 1]
    if twice:
        raise DataError(f"data file {path} has more than one column {twice[0]!r}: rename one of them")
