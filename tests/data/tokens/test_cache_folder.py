"""The files of the cache: ages, deletion, and the limit."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_bge.data.batches.micro_batches import EncodedDataset
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.tokens.cache import tokenize_cached
from lightning_bge.data.tokens.cache_folder import SIZES, TOKENS, UNFINISHED, cached_files, clear_cache, limit_cache
from lightning_bge.errors import ConfigError
from lightning_bge.runtime.cache_dir import mark_used
from tests.helpers.small_texts import random_texts

DAY = 86400


def make(folder: Path, name: str, size: int, days: float) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - days * DAY,) * 2)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size, days in (
        *(("new.arrow", 10, 0), ("week.arrow", 20, 7), ("month.arrow", 40, 30), ("writing.tmp", 5, 0.5)),
        *(("left.tmp", 5, 2), ("micro_batch_sizes/k.json", 3, 8), ("micro_batch_sizes/.k.json-x1", 3, 2)),
        *(("mine.txt", 100, 90), ("micro_batch_sizes.lock", 0, 50)),
    ):
        make(tmp_path, name, size, days)
    return tmp_path


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_files_are_listed_with_kind_size_and_age(folder: Path) -> None:
    found = cached_files(folder)
    assert [file.age for file in found] == sorted(file.age for file in found)
    assert {(file.path.name, file.kind, file.size, round(file.age / DAY, 2)) for file in found} == {
        *(("new.arrow", TOKENS, 10, 0.0), ("week.arrow", TOKENS, 20, 7.0), ("month.arrow", TOKENS, 40, 30.0)),
        *(("writing.tmp", UNFINISHED, 5, 0.5), ("left.tmp", UNFINISHED, 5, 2.0)),
        *(("k.json", SIZES, 3, 8.0), (".k.json-x1", UNFINISHED, 3, 2.0)),
    }


OTHERS = {"mine.txt", "micro_batch_sizes.lock", "writing.tmp"}  # not of the cache, or being written


def test_clear_deletes_what_the_cache_has_and_nothing_else(folder: Path) -> None:
    assert clear_cache(folder) == 10 + 20 + 40 + 5 + 3 + 3
    assert names(folder) == OTHERS
    assert clear_cache(folder) == 0


def test_clear_can_keep_what_was_used_lately(folder: Path) -> None:
    assert clear_cache(folder, older_than=7.5) == 40 + 3
    assert names(folder) - OTHERS == {"new.arrow", "week.arrow", "left.tmp", "micro_batch_sizes/.k.json-x1"}


def test_the_least_recently_used_files_are_deleted_beyond_the_limit(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    limit_cache(folder, 70)
    assert not caplog.messages
    limit_cache(folder, 69)
    kept = names(folder)
    assert kept >= {"new.arrow", "week.arrow", "micro_batch_sizes/k.json", "left.tmp"}
    assert "month.arrow" not in kept
    text = "1 file of tokenized texts, not used for 30 days or longer (40 bytes)"
    assert caplog.messages == [f"{folder}: deleted to stay below data.cache_gb: {text}"]


def test_a_file_used_within_the_last_day_is_kept(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    mark_used(folder / "week.arrow")
    limit_cache(folder, 1)
    assert names(folder) & {"new.arrow", "week.arrow", "month.arrow"} == {"new.arrow", "week.arrow"}
    assert "used within the last day take 30 bytes, above data.cache_gb, and are kept" in caplog.text


def test_a_file_that_cannot_be_deleted_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "month.arrow")

    monkeypatch.setattr(Path, "unlink", refuse)
    limit_cache(folder, 1)
    assert "can't be deleted to stay below data.cache_gb: 2 files of" in caplog.text
    assert "[Errno 13] Permission denied" in caplog.text


def test_reading_marks_a_file_as_used_and_writing_limits_the_cache(tokenizer: Any, tmp_path: Path) -> None:
    texts = random_texts(20)

    def age(tokens: Any) -> float:
        return time.time() - tokens.path.stat().st_mtime

    def put_back(tokens: Any) -> None:
        os.utime(tokens.path, (time.time() - 5 * DAY,) * 2)

    first = tokenize_cached(texts, tokenizer, 10, tmp_path)
    for use in (
        lambda: tokenize_cached(texts, tokenizer, 10, tmp_path),
        lambda: EncodedDataset(first, None, None, 100),
        first.__reduce__,  # a worker process is going to open it
    ):
        put_back(first)
        use()
        assert age(first) < 60
    put_back(first)
    second = tokenize_cached(texts, tokenizer, 11, tmp_path, cache_gb=1e-9)
    assert [file.path for file in cached_files(tmp_path)] == [second.path]  # the new one is kept, however large it is
    put_back(second)
    third = tokenize_cached(texts, tokenizer, 12, tmp_path)  # no limit
    assert {file.path for file in cached_files(tmp_path)} == {second.path, third.path}


def test_marking_a_file_that_is_gone_does_nothing(tmp_path: Path) -> None:
    mark_used(tmp_path / "gone.arrow")
    assert not (tmp_path / "gone.arrow").exists()


def test_the_data_module_passes_its_limit_on(pairs_file: Path, tokenizer_dir: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    old = make(cache, "old.arrow", 10, 3)
    options = {"train_file": str(pairs_file), "cache_dir": str(cache)}
    TextDataModule(tokenizer_dir, **options, max_length=31, cache_gb=None).setup("fit")  # type: ignore[arg-type]
    assert old.exists()
    TextDataModule(tokenizer_dir, **options, max_length=32, cache_gb=1e-6).setup("fit")  # type: ignore[arg-type]
    assert not old.exists()
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="cache_gb must be a number above 0, or null, got"):
            TextDataModule(tokenizer_dir, cache_gb=wrong)
