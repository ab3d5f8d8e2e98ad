"""The JSON file that `plan` and `audit` write, and a process that starts itself again."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from lightning_bge.cli import search_options
from lightning_bge.cli.search_options import SPENT, starting_again, within_time, write_output
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.scheduling.trial_loop import MemoryKeptError


def test_the_file_follows_the_umask_and_its_folder_is_made(tmp_path: Path) -> None:
    path, before = tmp_path / "new" / "plan.json", os.umask(0o027)
    try:
        write_output(str(path), {"hours": 1})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    assert json.loads(path.read_text()) == {"schema_version": 1, "hours": 1}
    write_output(None, {})


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    path, found = tmp_path / "pipe", list[str]()
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: found.append(path.read_text()))
    reader.start()
    write_output(str(path), {"hours": 1})
    reader.join()
    assert json.loads(found[0])["hours"] == 1
    assert path.is_fifo()


def test_a_process_that_starts_itself_again_keeps_its_folder_and_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = list[str]()
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append(os.getcwd()))
    monkeypatch.setattr(search_options, "_STARTED_IN", str(tmp_path))
    monkeypatch.setattr(search_options, "_STARTED", search_options.time.monotonic() - 40.0)
    monkeypatch.setenv(SPENT, "10.0")
    monkeypatch.chdir(tmp_path.parent)
    with starting_again():
        raise MemoryKeptError("held")
    assert started == [str(tmp_path)]
    assert float(os.environ[SPENT]) == pytest.approx(50.0, abs=5.0)
    left = within_time(StudyConfig(timeout=60.0)).timeout
    assert left == pytest.approx(10.0, abs=5.0)
    assert within_time(StudyConfig(timeout=30.0)).timeout == 0.001  # it is over
    assert within_time(StudyConfig()).timeout is None
    monkeypatch.delenv(SPENT)
    assert within_time(StudyConfig(timeout=60.0)).timeout == 60.0
