"""`lightning-bge cache list | clear`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    (folder / "micro_batch_sizes").mkdir(parents=True)
    now = time.time()
    for name, size, days in (
        *((f"{'a' * 64}.arrow", 3 * 2**20, 0.1), (f"{'b' * 64}.arrow", 5 * 2**20, 10)),
        *(("micro_batch_sizes/k.json", 100, 12), ("a.tmp", 7, 0)),
    ):
        (folder / name).write_bytes(b"x" * size)
        os.utime(folder / name, (now - days * 86400,) * 2)
    monkeypatch.setenv("LIGHTNING_BGE_CACHE", str(folder))
    return folder


def test_list_shows_sizes_and_ages(run: Run, folder: Path) -> None:
    status, out, err = run("cache", "list")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        str(folder),
        "     3.0 MiB      2 hours ago  aaaaaaaaaaaaaaaa...arrow",
        "     5.0 MiB     10 days ago  bbbbbbbbbbbbbbbb...arrow",
        "unfinished files: 1 file, 7 bytes, deleted by clear once they are a day old",
        "tokenized texts: 2 files, 8.0 MiB, last used 2 hours ago",
        "micro-batch sizes: 1 file, 100 bytes, last used 12 days ago",
        "total: 4 files, 8.0 MiB",
    ]


def test_clear_deletes_old_files_and_then_all(run: Run, folder: Path) -> None:
    status, out, _ = run("cache", "clear", "--older_than", "11")
    assert (status, out) == (0, f"{folder}: 1 file deleted, 100 bytes; 3 files left\n")
    status, out, _ = run("cache", "clear", "--older_than", "0.5")
    assert out == f"{folder}: 1 file deleted, 5.0 MiB; 2 files left\n"
    status, out, _ = run("cache", "clear")  # a run may need what was used within the last day
    assert (
        out == f"{folder}: 0 files deleted, 0 bytes; 2 files left; --older_than 0 deletes those of the last day too\n"
    )
    status, out, _ = run("cache", "clear", "--older_than", "0")
    assert out == f"{folder}: 1 file deleted, 3.0 MiB; 1 file left\n"  # another process may be writing it
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["a.tmp"]


def test_another_folder_is_taken_from_the_option(run: Run, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    status, out, _ = run("cache", "list", "--cache_dir", str(other))
    assert (status, out) == (0, f"{other}\ntotal: 0 files, 0 bytes\n")
    status, out, _ = run("cache", "clear", "--cache_dir", str(other))
    assert (status, out) == (0, f"{other}: 0 files deleted, 0 bytes; 0 files left\n")
    assert len(list(folder.rglob("*.arrow"))) == 2


def test_a_cache_that_does_not_exist_yet(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_BGE_CACHE", str(tmp_path / "none"))
    for action in ("list", "clear"):
        expected = f"{tmp_path / 'none'}: nothing is cached, the folder does not exist yet\n"
        assert run("cache", action) == (0, expected, "")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["lst"], "invalid choice: 'lst'"),
        ([], "action"),
        (["clear", "--older_than", "-1"], "--older_than: expected a number of days from 0 up, for clear, got -1"),
        (["clear", "--older_than", "nan"], "--older_than: expected a number of days from 0 up, for clear, got nan"),
        (["list", "--older_than", "1"], "--older_than: expected a number of days from 0 up, for clear, got 1"),
        (["clear", "--older_than", "week"], "invalid float value: 'week'"),
        (["list", "--cache_dir", "not/there"], "--cache_dir: expected the folder of a cache, got not/there"),
    ],
)
def test_wrong_arguments_are_one_line_and_delete_nothing(run: Run, folder: Path, args: list[str], message: str) -> None:
    status, _, err = run("cache", *args)
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert len(list(folder.rglob("*.arrow"))) == 2


def test_no_torch_is_imported(folder: Path) -> None:
    code = "import sys; from lightning_bge.cli.main import main; main(['cache', 'list']); "
    code += "print(sorted({'torch', 'numpy', 'pyarrow', 'tokenizers', 'transformers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"
