"""Rows as windows of token ids, against windows that are cut by hand."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_bge.errors import ConfigError, DataError
from lightning_bge.tokenization import TokenizedRows, WindowConfig, check_stride, full_lengths, tokenize_rows
from tests.helpers.plain_windows import plain_types, plain_windows
from tests.helpers.small_texts import build_tokenizer, random_texts


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(model_max_length=16)


def by_row(values: list[list[int]], windows: list[int]) -> list[list[list[int]]]:
    rest = iter(values)
    return [[next(rest) for _ in range(count)] for count in windows]


@pytest.mark.parametrize(
    ("columns", "max_length", "stride"), [(1, 8, 0), (1, 8, 3), (1, 6, 3), (1, 60, 5), (2, 24, 0), (2, 22, 5)]
)
def test_windows_are_those_cut_by_hand(tokenizer: Any, columns: int, max_length: int, stride: int) -> None:
    short, long = random_texts(60, columns=1), random_texts(60, seed=1, longest=50, columns=1)
    rows = [(*first, *second)[-columns:] for first, second in zip(short, long, strict=True)]
    found = tokenize_rows(rows, tokenizer, max_length, WindowConfig(stride=stride))
    expected = [plain_windows(tokenizer, row, max_length, stride) for row in rows]
    assert found.windows == [len(windows) for windows in expected]
    assert by_row(found.input_ids, found.windows) == expected
    types = [plain_types(window, tokenizer.sep_token_id, columns == 2) for windows in expected for window in windows]
    assert found.token_type_ids == types
    assert found.dropped == [0] * 60
    if max_length < 60:
        assert max(found.windows) > 2
        assert all(len(set(window)) <= len(window) <= max_length for window in found.input_ids)


@pytest.mark.parametrize("columns", [1, 2])
def test_rows_that_fit_are_as_without_windows(tokenizer: Any, columns: int) -> None:
    rows = random_texts(40, columns=columns, longest=6)
    plain, windowed = (tokenize_rows(rows, tokenizer, 16, WindowConfig(stride=stride)) for stride in (None, 4))
    assert (plain.windows, plain.dropped) == (None, None)
    assert windowed.windows == [1] * 40
    assert (windowed.input_ids, windowed.token_type_ids) == (plain.input_ids, plain.token_type_ids)


def test_windows_above_the_limit_are_dropped_and_counted(tokenizer: Any) -> None:
    rows = random_texts(40, columns=1, longest=50)
    every = tokenize_rows(rows, tokenizer, 8, WindowConfig(stride=2))
    some = tokenize_rows(rows, tokenizer, 8, WindowConfig(stride=2, max_windows=3))
    assert every.windows is not None
    assert some.windows == [min(count, 3) for count in every.windows]
    whole = by_row(every.input_ids, every.windows)
    assert by_row(some.input_ids, some.windows) == [windows[:3] for windows in whole]
    assert some.dropped == [sum(map(len, windows[3:])) for windows in whole]
    assert max(some.dropped) > 0


@pytest.mark.parametrize("columns", [1, 2])
def test_full_lengths_are_those_without_a_limit(tokenizer: Any, columns: int) -> None:
    rows = random_texts(60, columns=columns, longest=20)
    expected = [len(tokenizer(*row, verbose=False)["input_ids"]) for row in rows]
    for length in (8, 16, 60):
        found = tokenize_rows(rows, tokenizer, length)
        assert full_lengths(rows, found, tokenizer, length) == expected
    assert full_lengths([], TokenizedRows([], None), tokenizer, 8) == []


def test_full_lengths_of_windows_count_those_that_are_dropped(tokenizer: Any) -> None:
    rows = random_texts(40, columns=1, longest=50)
    for most in (None, 1, 3):
        found = tokenize_rows(rows, tokenizer, 8, WindowConfig(stride=2, max_windows=most))
        expected = [sum(map(len, plain_windows(tokenizer, row, 8, 2))) for row in rows]
        assert full_lengths(rows, found, tokenizer, 8) == expected


def test_a_first_text_that_leaves_no_room_is_an_error_with_the_row(tokenizer: Any) -> None:
    rows = [("w1 w2", "w3"), ("w1 w2 w3 w4 w5 w6 w7", "w3"), ("w1 w2 w3 w4 w5 w6 w7", "w3 w4 w5 w6 w7 w8")]
    expected = (
        r"rows.csv: row 3: the first text has 7 tokens. Windows of 12 tokens \(data.max_length\) that share 2 "
        r"\(data.windows.stride\) have room for 6\. Raise data.max_length, lower"
    )
    with pytest.raises(DataError, match=expected):
        tokenize_rows(rows, tokenizer, 12, WindowConfig(stride=2), lambda row: f"rows.csv: row {row + 1}")
    # the second row fits without windows, and one token less in the first text leaves room
    rows[2] = ("w1 w2 w3 w4 w5 w6", rows[2][1])
    assert tokenize_rows(rows, tokenizer, 12, WindowConfig(stride=2)).windows == [1, 1, 4]


def test_texts_longer_than_the_model_cause_no_warning_of_transformers(
    tokenizer: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [(" ".join(["w1"] * 60), " ".join(["w2"] * 90))]
    with pytest.raises(DataError, match="row 1"):
        tokenize_rows(rows, tokenizer, 16, WindowConfig(stride=2))
    full_lengths(rows, tokenize_rows(rows, tokenizer, 16), tokenizer, 16)
    assert "longer than" not in caplog.text + capfd.readouterr().err


@pytest.mark.parametrize(("pair", "most"), [(False, 5), (True, 3)])
def test_a_stride_with_which_windows_do_not_move_is_refused(tokenizer: Any, pair: bool, most: int) -> None:
    check_stride(tokenizer, 8, WindowConfig(stride=most), pair)
    check_stride(tokenizer, 8, WindowConfig(), pair)
    with pytest.raises(ConfigError, match=rf"data.windows.stride must be at most {most}, .*; got {most + 1}\. Lower"):
        check_stride(tokenizer, 8, WindowConfig(stride=most + 1), pair)
    columns = 1 + pair
    with pytest.raises(ConfigError, match=r"data\.windows\.stride must be at most"):
        tokenize_rows(random_texts(3, columns=columns), tokenizer, 8, WindowConfig(stride=most + 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": -1}, "data.windows.stride must be null or a whole number from 0 up, got -1"),
        ({"stride": 1.5}, "data.windows.stride must be null or a whole number from 0 up, got 1.5"),
        ({"stride": True}, "data.windows.stride must be null or a whole number from 0 up, got True"),
        ({"max_windows": 0}, "data.windows.max_windows must be null or a whole number from 1 up, got 0"),
        ({"pooling": "sum"}, "data.windows.pooling must be mean or max, got 'sum'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WindowConfig(**options)
