"""Texts longer than the model: rows as one sequence of token ids each, or as several that overlap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_bge.errors import ConfigError, DataError

Pooling = Literal["mean", "max"]


@dataclass(frozen=True)
class WindowConfig:
    """Sliding windows over texts that are longer than `data.max_length` tokens.

    A row's windows are computed as sequences of their own, and their logits are pooled. Of a pair each window holds the
    whole first text and a part of the second one. Rows that fit into `max_length` tokens are not changed.

    Args:
        stride: number of tokens that neighbouring windows share, as in transformers' tokenizers. Unset: no windows;
            longer texts are truncated, and the other two options have no effect.
        pooling: how the logits of a row's windows become those of the row: their mean, or their maximum for each
            output.
        max_windows: the most windows of a row, which bounds the memory that a row takes; the text after them is
            dropped. Unset: no limit.
    """

    stride: int | None = None
    pooling: Pooling = "mean"
    max_windows: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("stride", 0), ("max_windows", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ConfigError(f"data.windows.{name} must be null or a whole number from {least} up, got {value!r}")
        if self.pooling not in get_args(Pooling):
            raise ConfigError(f"data.windows.pooling must be {' or '.join(get_args(Pooling))}, got {self.pooling!r}")


NO_WINDOWS = WindowConfig()
NameRow = Callable[[int], str]  # of the number of a row, from 0, for messages


def name_row(row: int) -> str:
    """`row 1` for the row number 0."""
    return f"row {row + 1}"


@dataclass(frozen=True)
class TokenizedRows:
    """Rows as sequences of token ids, special tokens included.

    Attributes:
        input_ids: of S sequences; those of a row follow each other.
        token_type_ids: of each token, or None where the tokenizer makes none.
        windows: number of sequences of each row; None: one each.
        dropped: tokens of the windows of each row that `max_windows` has dropped; None with `windows`.
    """

    input_ids: list[list[int]]
    token_type_ids: list[list[int]] | None
    windows: list[int] | None = None
    dropped: list[int] | None = None


def tokenize_rows(
    rows: Sequence[tuple[str, ...]],
    tokenizer: Any,
    max_length: int,
    windows: WindowConfig = NO_WINDOWS,
    name: NameRow = name_row,
) -> TokenizedRows:
    """Token ids of rows, as the tokenizer itself truncates them or cuts them into windows.

    Args:
        rows: all of one or all of two texts.
        tokenizer: a fast tokenizer of transformers.
        max_length: the most tokens of a sequence, special tokens counted.
        windows: without a stride each row is one sequence, and the longer text of a pair loses tokens first.
        name: names a row in messages.

    Raises:
        ConfigError: the stride is too large for `max_length`.
        DataError: the first text of a long pair leaves no room for windows over the second one.
    """
    columns = [list(column) for column in zip(*rows, strict=True)]
    options: dict[str, Any] = {"max_length": max_length, "return_attention_mask": False}
    if windows.stride is None:
        encoded = tokenizer(*columns, truncation=True, **options)
        return TokenizedRows(encoded["input_ids"], encoded.get("token_type_ids"))
    pair = len(columns) == 2
    check_stride(tokenizer, max_length, windows, pair)
    if pair:
        _check_room(columns, tokenizer, max_length, windows.stride, name)
    options |= {"stride": windows.stride, "return_overflowing_tokens": True}
    encoded = tokenizer(*columns, truncation="only_second" if pair else True, **options)
    return _keep(encoded, len(rows), windows.max_windows)


def check_stride(tokenizer: Any, max_length: int, windows: WindowConfig, pair: bool) -> None:
    """Raise `ConfigError` where windows of `max_length` tokens would not move on."""
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    most = max_length - special - pair - 1  # one token of a first text, and one token further in each window
    if windows.stride is not None and windows.stride > most:
        raise ConfigError(
            f"data.windows.stride must be at most {most}, as windows have {max_length} tokens (data.max_length), "
            f"{special} of them special{', and hold the first text' if pair else ''}; got {windows.stride}. Lower "
            "data.windows.stride, or raise data.max_length"
        )


def full_lengths(rows: Sequence[tuple[str, ...]], found: TokenizedRows, tokenizer: Any, max_length: int) -> list[int]:
    """Tokens that each row would have if nothing of it were dropped: N.

    Args:
        rows: as `tokenize_rows` got them. Only those at the limit are tokenized once more, without it.
        found: what it returned. With windows the tokens of all windows count, and nothing is tokenized.
        tokenizer: as it got it.
        max_length: as it got it.
    """
    if found.windows is not None and found.dropped is not None:
        lengths = iter(map(len, found.input_ids))
        kept = [sum(next(lengths) for _ in range(count)) for count in found.windows]
        return [here + more for here, more in zip(kept, found.dropped, strict=True)]
    whole = [len(ids) for ids in found.input_ids]
    if at_limit := [row for row, length in enumerate(whole) if length >= max_length]:
        columns = ([text[column] for text in map(rows.__getitem__, at_limit)] for column in range(len(rows[0])))
        for row, length in zip(at_limit, _count_tokens(tokenizer, *columns), strict=True):
            whole[row] = length
    return whole


def _count_tokens(tokenizer: Any, *columns: list[str], special: bool = True) -> list[int]:
    """Tokens of each row, without a limit."""
    # verbose: transformers warns about texts that are longer than the model, which is what is looked for
    options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
    return [len(ids) for ids in tokenizer(*columns, **options)["input_ids"]]


def _check_room(columns: list[list[str]], tokenizer: Any, max_length: int, stride: int, name: NameRow) -> None:
    """Raise `DataError` for a pair that needs windows, and whose first text leaves no room for them."""
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    firsts = _count_tokens(tokenizer, columns[0], special=False)
    narrow = [row for row, first in enumerate(firsts) if room - first <= stride]
    if not narrow:
        return
    whole = _count_tokens(tokenizer, *([column[row] for row in narrow] for column in columns))
    for row, length in zip(narrow, whole, strict=True):
        if length > max_length:
            raise DataError(
                f"{name(row)}: the first text has {firsts[row]} tokens. Windows of {max_length} tokens "
                f"(data.max_length) that share {stride} (data.windows.stride) have room for {room - stride - 1}. Raise "
                "data.max_length, lower data.windows.stride, shorten the text, or name the longer column last in "
                "data.text_columns"
            )


def _keep(encoded: Any, rows: int, most: int | None) -> TokenizedRows:
    """The windows that the tokenizer has made, without those above the limit."""
    windows, dropped, kept = [0] * rows, [0] * rows, []
    for number, row in enumerate(encoded["overflow_to_sample_mapping"]):
        if most is None or windows[row] < most:
            windows[row] += 1
            kept.append(number)
        else:
            dropped[row] += len(encoded["input_ids"][number])
    ids, types = encoded["input_ids"], encoded.get("token_type_ids")
    return TokenizedRows(
        [ids[number] for number in kept],
        None if types is None else [types[number] for number in kept],
        windows,
        dropped,
    )
