"""One line about texts that are longer than what is read of them."""

import logging

import numpy as np

from lightning_bge.data.tokens.cache import TokenArrays
from lightning_bge.runtime.log_once import log_once
from lightning_bge.tokenization import WindowConfig

log = logging.getLogger(__name__)

NO_LIMIT = 10**6  # tokenizers that know no limit of their model have a much larger number


def warn_of_truncation(
    file: str, tokens: TokenArrays, max_length: int, model_length: int, windows: WindowConfig
) -> None:
    """Log how many rows of a file are truncated, and by how much; once a process for each file and limit.

    Args:
        file: its name.
        tokens: of its rows, with their full lengths.
        max_length: the limit in effect.
        model_length: the limit of the tokenizer, and so of its model.
        windows: as the rows were cut.
    """
    text = describe_truncation(tokens, max_length, model_length, windows)
    if text is not None:
        log_once(log, logging.WARNING, f"{file}: {text}")


def describe_truncation(tokens: TokenArrays, max_length: int, model_length: int, windows: WindowConfig) -> str | None:
    """The share of rows that are truncated, their full lengths, and what to do; None where none is."""
    found = Truncation()
    found.add(tokens)
    return found.describe(max_length, model_length, windows)


class Truncation:
    """What is truncated of rows that are seen piece by piece."""

    def __init__(self) -> None:
        self._rows, self._cut = 0, [np.empty(0, np.int32)]

    def add(self, tokens: TokenArrays) -> None:
        """See some rows, with their full lengths."""
        assert tokens.full_lengths is not None
        self._rows += len(tokens)
        self._cut.append(tokens.full_lengths[tokens.full_lengths > tokens.lengths])

    def describe(self, max_length: int, model_length: int, windows: WindowConfig) -> str | None:
        """As `describe_truncation`, of all rows."""
        cut = np.concatenate(self._cut)
        return _describe(cut, self._rows, max_length, model_length, windows) if len(cut) else None


def _describe(cut: np.ndarray, total: int, max_length: int, model_length: int, windows: WindowConfig) -> str:
    share, rows = len(cut) / total, f"{len(cut):,} of {total:,} rows"
    shown = f"{share:.0%}" if share >= 0.01 else "less than 1%"
    lengths = f"{np.median(cut):,.0f} tokens in the median and {cut.max():,} at most"
    if windows.stride is not None:
        return (
            f"{rows} ({shown}) have more than {windows.max_windows} windows, the text after which is dropped: all of "
            f"their windows have {lengths}. Raise data.windows.max_windows to read more of them"
        )
    raised = "" if max_length >= model_length else "raise data.max_length, "
    if raised and model_length < NO_LIMIT:
        raised = f"raise data.max_length (the model takes up to {model_length:,}), "
    return (
        f"{rows} ({shown}) are truncated to {max_length:,} tokens: they have {lengths}. To read more of them, {raised}"
        f"{'or ' if raised else ''}set data.windows.stride, such as {max(1, max_length // 4)}"
    )
