"""Files that the user names."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_bge.runtime.output_file import is_stream, output_target, replacing, write_output_text


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_follows_the_umask(tmp_path: Path, mask: int, expected: int) -> None:
    os.umask(mask)
    write_output_text(tmp_path / "new" / "a.json", "{}\n")
    assert mode(tmp_path / "new" / "a.json") == expected
    assert os.umask(mask) == mask  # reading it has not changed it


@pytest.mark.usefixtures("umask")
def test_an_existing_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    path.chmod(0o640)
    write_output_text(path, "new")
    assert (mode(path), path.read_text()) == (0o640, "new")


@pytest.mark.parametrize("exists", [True, False])
def test_the_file_behind_a_link_is_replaced(tmp_path: Path, exists: bool) -> None:
    target, link = tmp_path / "folder" / "real.json", tmp_path / "link.json"
    target.parent.mkdir()
    if exists:
        target.write_text("old")
    link.symlink_to(target)
    write_output_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["real.json"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    write_output_text(pipe, "text\n")
    reader.join()
    assert found == ["text\n"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_what_is_a_stream(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/stdout")
    (tmp_path / "file").touch()
    for name in ("/dev/stdout", "/dev/stderr", "/dev/fd/1", "/dev/../dev/stdout", "/dev/null", tmp_path / "link"):
        assert is_stream(name), name
    for name in (tmp_path, tmp_path / "file", tmp_path / "none", "/dev/shm/x.csv"):
        assert not is_stream(name), name


def test_an_error_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    target = output_target(tmp_path / "a.csv")
    target.write_text("old")

    def fail() -> None:
        with replacing(target) as draft:
            draft.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
