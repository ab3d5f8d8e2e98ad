"""Paths that can't be written, found before anything is done."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_bge.errors import ConfigError
from lightning_bge.runtime.paths import check_folder, check_output, nearest_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data.csv").write_text("text\n")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link.csv").symlink_to(tmp_path / "data.csv")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone" / "file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return tmp_path


@pytest.mark.parametrize("name", ["new.csv", "new/deep/x.csv", "file", "dangling"])
def test_what_can_be_written_is_accepted_and_nothing_is_made(folder: Path, name: str) -> None:
    before = sorted(folder.rglob("*"))
    check_output("output", folder / name, {"data.train_file": [str(folder / "data.csv")]})
    assert sorted(folder.rglob("*")) == before


def test_devices_and_pipes_are_accepted(tmp_path: Path) -> None:
    check_output("output", "/dev/null")
    os.mkfifo(tmp_path / "pipe")
    check_output("output", tmp_path / "pipe")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "expected a file, got the folder"),
        ("new/", "expected a file, got the folder"),
        ("file/x.csv", "file is a file, where a folder is needed"),
        ("data.csv", "is what data.train_file reads, and would be replaced"),
        ("link.csv", "is what data.train_file reads, and would be replaced"),
        ("../" * 20, "expected a file, got the folder"),
        ("x" * 300, r"can't be a path \(File name too long\)"),
        ("a\0b", r"can't be a path \(.*null"),
        ("loop", "a file|can't be a path|no permission"),
    ],
)
def test_what_can_not_be_written_is_refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^output: .*({message})"):
        check_output("output", f"{folder}/{name}", {"data.train_file": [str(folder / "data.csv"), "gone"]})


def test_a_lack_of_permission_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so that the answer of the system is given here."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
    for check in (check_output, check_folder):
        with pytest.raises(ConfigError, match=f"no permission to write in {folder}"):
            check("output", folder / "new" / "x")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file", "file is a file, where a folder is needed"),
        ("file/run", "file is a file, where a folder is needed"),
        ("", "summary.json is a folder, where a file is needed"),
        (".", "summary.json is a folder, where a file is needed"),
        ("run", "checkpoints is a file, where a folder is needed"),
    ],
)
def test_a_run_folder_whose_names_are_of_the_other_kind(folder: Path, path: str, message: str) -> None:
    (folder / "summary.json").mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "checkpoints").touch()
    with pytest.raises(ConfigError, match=f"^run_dir: .*{message}"):
        check_folder("run_dir", f"{folder}/{path}", ["summary.json"], ["checkpoints"])


def test_a_run_folder_that_is_new_or_in_use_is_accepted(folder: Path) -> None:
    check_folder("run_dir", folder / "new" / "run", ["summary.json"], ["checkpoints"])
    check_folder("run_dir", folder, ["file"], ["checkpoints"])


def test_the_nearest_folder_exists(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nearest_folder(folder / "a" / "b") == folder
    monkeypatch.chdir(folder)
    assert nearest_folder(Path("a/b")) == folder
