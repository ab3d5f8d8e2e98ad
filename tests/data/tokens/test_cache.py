from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import pickle
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import CrossEncoder
from transformers import BertConfig, BertForSequenceClassification

from lightning_bge.data.tokens import cache as cache_module
from lightning_bge.data.tokens.cache import tokenize_cached
from lightning_bge.data.tokens.cache_folder import clear_cache
from lightning_bge.errors import DataError
from lightning_bge.runtime.cache_dir import default_cache_dir
from tests.helpers.small_texts import build_tokenizer, random_texts

# Python 3.12 warns of a fork beside threads; the children here start none and do not live long.
forks = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def files(folder: Path) -> list[Path]:
    return list(folder.glob("*.arrow"))


def rows_of(tokens: cache_module.TokenArrays) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens.input_ids, tokens.offsets[1:-1])]


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("max_length", [6, 13, 512])
def test_same_as_the_tokenizer(tokenizer: Any, tmp_path: Path, columns: int, max_length: int) -> None:
    texts = random_texts(50, columns=columns)
    for _ in range(2):  # written, then read
        tokens = tokenize_cached(texts, tokenizer, max_length, tmp_path)
        for row, text in enumerate(texts):
            expected = tokenizer(*text, truncation=True, max_length=max_length)
            here = slice(tokens.offsets[row], tokens.offsets[row + 1])
            assert tokens.input_ids[here].tolist() == expected["input_ids"]
            assert tokens.token_type_ids is not None
            assert tokens.token_type_ids[here].tolist() == expected["token_type_ids"]
    assert (tokens.lengths == np.diff(tokens.offsets)).all()
    assert tokens.lengths.max() <= max_length
    assert len(tokens) == 50
    dtypes = (tokens.input_ids.dtype, tokens.offsets.dtype, tokens.token_type_ids.dtype, tokens.lengths.dtype)
    assert dtypes == (np.int32, np.int64, np.uint8, np.int32)
    assert not tokens.input_ids.flags.writeable


def test_same_as_cross_encoder(tokenizer: Any, tmp_path: Path) -> None:
    """Who loads the export truncates as we do."""
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    peer = CrossEncoder(str(tmp_path / "model"), max_length=10, device="cpu")
    texts = random_texts(30, longest=15)
    theirs = peer.preprocess(texts)
    kept = [ids[mask.bool()].tolist() for ids, mask in zip(theirs["input_ids"], theirs["attention_mask"], strict=True)]
    assert rows_of(tokenize_cached(texts, tokenizer, 10, tmp_path / "cache")) == kept


def test_chunks_give_the_same_tokens(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = random_texts(50)
    whole = tokenize_cached(texts, tokenizer, 20, tmp_path / "a")
    monkeypatch.setattr(cache_module, "_CHUNK", 7)
    chunked = tokenize_cached(texts, tokenizer, 20, tmp_path / "b")
    np.testing.assert_array_equal(whole.input_ids, chunked.input_ids)
    np.testing.assert_array_equal(whole.offsets, chunked.offsets)


def test_without_token_types(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(model_input_names=["input_ids", "attention_mask"])
    assert tokenize_cached(random_texts(3), tokenizer, 20, tmp_path).token_type_ids is None


def test_the_key_depends_on_texts_tokenizer_and_length(tokenizer: Any, tmp_path: Path) -> None:
    texts = random_texts(5)
    tokenize_cached(texts, tokenizer, 20, tmp_path)
    tokenize_cached(list(texts), tokenizer, 20, tmp_path)
    assert len(files(tmp_path)) == 1
    tokenize_cached(texts, tokenizer, 21, tmp_path)
    tokenize_cached([(f"{a} {b}",) for a, b in texts], tokenizer, 20, tmp_path)
    tokenize_cached([("w1 w2", "w3")], tokenizer, 20, tmp_path)
    tokenize_cached([("w1", " w2w3")], tokenizer, 20, tmp_path)
    tokenize_cached(texts, build_tokenizer(do_lower_case=False), 20, tmp_path)
    assert len(files(tmp_path)) == 6
    assert clear_cache(tmp_path) > 0
    assert files(tmp_path) == []


def test_modes_and_default_folder(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_BGE_CACHE", str(tmp_path / "deep" / "cache"))
    path = tokenize_cached(random_texts(3), tokenizer, 20).path
    assert path.parent == tmp_path / "deep" / "cache"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    monkeypatch.delenv("LIGHTNING_BGE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "lightning-bge"


def test_pickle_maps_the_file(tokenizer: Any, tmp_path: Path) -> None:
    tokens = tokenize_cached(random_texts(500), tokenizer, 20, tmp_path)
    data = pickle.dumps(tokens)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data).input_ids, tokens.input_ids)


@pytest.mark.parametrize("damage", ["empty", "cut", "header only", "rows", "garbage"])
def test_a_damaged_file_is_replaced(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    texts = random_texts(200)
    good = tokenize_cached(texts, tokenizer, 20, tmp_path)
    expected, content = rows_of(good), good.path.read_bytes()
    if damage == "rows":  # a sound file of other content
        content = tokenize_cached(texts[:3], tokenizer, 20, tmp_path / "other").path.read_bytes()
    good.path.unlink()
    short = {"empty": 0, "cut": len(content) // 2, "header only": 8}.get(damage, len(content))
    good.path.write_bytes(b"x" * 5000 if damage == "garbage" else content[:short])
    with caplog.at_level(logging.WARNING):
        assert rows_of(tokenize_cached(texts, tokenizer, 20, tmp_path)) == expected
        assert rows_of(tokenize_cached(texts, tokenizer, 20, tmp_path)) == expected
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_old_leftovers_are_removed(tokenizer: Any, tmp_path: Path) -> None:
    old, young = tmp_path / "a-1.tmp", tmp_path / "a-2.tmp"
    for path in (old, young):
        path.write_bytes(b"half a file")
    os.utime(old, (time.time() - 90000,) * 2)
    tokenize_cached(random_texts(3), tokenizer, 20, tmp_path)
    assert not old.exists()
    assert young.exists()
    assert len(files(tmp_path)) == 1


def start(work: Callable[[], None]) -> Any:
    """A forked process: it has everything imported, and the patches that `work` makes stay in it."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


@forks
def test_killed_while_writing(tokenizer: Any, tmp_path: Path) -> None:
    """The process dies between writing and renaming: the next one sees no cache file."""
    texts = random_texts(50)

    def work() -> None:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        tokenize_cached(texts, tokenizer, 20, tmp_path)

    process = start(work)
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.tmp"))) == 1
    assert files(tmp_path) == []
    assert len(tokenize_cached(texts, tokenizer, 20, tmp_path)) == 50


@forks
def test_two_processes_at_once(tokenizer: Any, tmp_path: Path) -> None:
    texts = random_texts(300)
    expected = [tokenizer(*text, truncation=True, max_length=20)["input_ids"] for text in texts]
    together = multiprocessing.get_context("fork").Barrier(2)
    write = cache_module._write

    def write_together(*arguments: Any) -> None:
        together.wait(timeout=60)
        write(*arguments)

    def work() -> None:
        cache_module._write = write_together
        rows = rows_of(tokenize_cached(texts, tokenizer, 20, tmp_path / "shared"))
        assert rows == expected

    processes = [start(work) for _ in range(2)]
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.suffix for path in (tmp_path / "shared").iterdir()] == [".arrow"]
    assert len(tokenize_cached(texts, tokenizer, 20, tmp_path / "shared")) == len(texts)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def no_room(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(DataError, match=r"disk is full, [\d,]+ bytes are needed.*cache_dir.*LIGHTNING_BGE_CACHE"):
        tokenize_cached(random_texts(3), tokenizer, 20, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_really_full_device(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_full_device(**options: Any) -> tuple[int, str]:
        return os.open("/dev/full", os.O_WRONLY), str(tmp_path / "x.tmp")

    monkeypatch.setattr(cache_module.tempfile, "mkstemp", on_full_device)
    with pytest.raises(DataError, match="disk is full"):
        tokenize_cached(random_texts(3000), tokenizer, 20, tmp_path)


def test_a_folder_that_cannot_be_made(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write the token cache.*cache_dir"):
        tokenize_cached(random_texts(3), tokenizer, 20, tmp_path / "file")


def test_row_without_tokens(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None  # no special tokens
    with pytest.raises(DataError, match=r"row 2: the tokenizer makes no token of it \(1 such rows\): drop them"):
        tokenize_cached([("w1",), ("\u200b\x01",)], tokenizer, 20, tmp_path)


def test_two_files_become_one_that_other_processes_map(tokenizer: Any, tmp_path: Path) -> None:
    texts = random_texts(40, seed=3)
    parts = [cache_module.tokenize_cached(part, tokenizer, 16, tmp_path) for part in (texts[:25], texts[25:])]
    both = cache_module.concatenate_tokens(*parts)
    assert rows_of(both) == rows_of(cache_module.tokenize_cached(texts, tokenizer, 16, tmp_path))
    assert both.token_type_ids is not None
    assert both.token_type_ids.tolist() == [kind for part in parts for kind in part.token_type_ids.tolist()]
    assert rows_of(pickle.loads(pickle.dumps(both))) == rows_of(both)
    written = both.path.stat().st_ino
    assert cache_module.concatenate_tokens(*parts).path.stat().st_ino == written
    # the order of the files is a part of the name
    assert rows_of(cache_module.concatenate_tokens(*reversed(parts))) == rows_of(parts[1]) + rows_of(parts[0])
