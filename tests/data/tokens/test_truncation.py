"""The line about texts that are truncated."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.encoded_file import load_file, load_training_file
from lightning_bge.data.tokens.cache import concatenate_tokens, tokenize_cached
from lightning_bge.data.tokens.truncation import describe_truncation
from lightning_bge.runtime.log_once import log_once
from lightning_bge.tokenization import WindowConfig
from tests.helpers.small_texts import random_texts

ROWS = [("w1 " * words,) for words in (3, 6, 7, 10, 20)]  # 5, 8, 9, 12 and 22 tokens


@pytest.fixture(autouse=True)
def anew() -> None:
    """What this process has read and said is forgotten."""
    for function in (log_once, load_file, load_training_file):
        function.cache_clear()


@pytest.mark.parametrize(
    ("model_length", "remedy"),
    [
        (512, "raise data.max_length (the model takes up to 512), or set data.windows.stride, such as 2"),
        (10**30, "raise data.max_length, or set data.windows.stride, such as 2"),
        (8, "set data.windows.stride, such as 2"),
    ],
)
def test_share_lengths_and_remedy(tokenizer: Any, tmp_path: Path, model_length: int, remedy: str) -> None:
    tokens = tokenize_cached(ROWS, tokenizer, 8, tmp_path)
    assert tokens.full_lengths is not None
    assert tokens.full_lengths.tolist() == [5, 8, 9, 12, 22]
    assert tokens.full_lengths.dtype == np.int32
    lengths = "they have 12 tokens in the median and 22 at most"
    expected = f"3 of 5 rows (60%) are truncated to 8 tokens: {lengths}. To read more of them, {remedy}"
    assert describe_truncation(tokens, 8, model_length, WindowConfig()) == expected


def test_nothing_is_said_where_nothing_is_dropped(tokenizer: Any, tmp_path: Path) -> None:
    for length, windows in ((22, WindowConfig()), (8, WindowConfig(2)), (8, WindowConfig(2, max_windows=5))):
        tokens = tokenize_cached(ROWS, tokenizer, length, tmp_path, windows)
        assert describe_truncation(tokens, length, 512, windows) is None


def test_dropped_windows_are_said(tokenizer: Any, tmp_path: Path) -> None:
    windows = WindowConfig(2, max_windows=2)
    tokens = tokenize_cached([*ROWS, *random_texts(295, columns=1, longest=6)], tokenizer, 8, tmp_path, windows)
    text = (
        "1 of 300 rows (less than 1%) have more than 2 windows, the text after which is dropped: all of their windows "
    )
    text += "have 38 tokens in the median and 38 at most. Raise data.windows.max_windows to read more of them"
    assert describe_truncation(tokens, 8, 512, windows) == text


def test_full_lengths_are_kept_when_files_are_joined(tokenizer: Any, tmp_path: Path) -> None:
    parts = [tokenize_cached(rows, tokenizer, 8, tmp_path) for rows in (ROWS, ROWS[::-1])]
    both = concatenate_tokens(*parts).full_lengths
    assert both is not None
    assert both.tolist() == [5, 8, 9, 12, 22, 22, 12, 9, 8, 5]


def test_each_file_says_it_once_a_process(
    pairs_file: Path, tokenizer_dir: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def read(max_length: int) -> list[str]:
        caplog.clear()
        load_file.cache_clear()
        load_training_file.cache_clear()
        options = {"train_file": str(pairs_file), "cache_dir": str(tmp_path / "cache"), "max_length": max_length}
        TextDataModule(tokenizer_dir, **options).setup("fit")  # type: ignore[arg-type]
        return [record.getMessage() for record in caplog.records if "truncated" in record.getMessage()]

    [found] = read(16)
    assert found.startswith(f"{pairs_file}: ")
    assert "of 60 rows" in found
    assert read(16) == []  # from the cache, and said already
    assert len(read(12)) == 1
    assert read(512) == []
    log_once.cache_clear()  # another process reads the cache
    assert read(16) == [found]
