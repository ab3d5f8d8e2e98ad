"""Drafts that are continued, and those that are not."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest

from lightning_bge.errors import ConfigError
from lightning_bge.prediction.formats import OutputFormat
from lightning_bge.prediction.sink import DraftSink

CSV = OutputFormat("csv")


def begin(path: Path, key: int = 1, pieces: int = 2) -> DraftSink:
    sink = DraftSink(str(path), CSV, {"key": key})
    sink.open(b"head\n")
    for number in range(pieces):
        sink.append(f"{number}\n".encode(), 1, Counter({"empty": number}))
    return sink


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_draft_becomes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("old")
    sink = begin(path)
    assert path.read_text() == "old"
    assert all((file.stat().st_mode & 0o077) == 0 for file in tmp_path.iterdir() if file != path)
    sink.complete()
    sink.close()
    assert path.read_text() == "head\n0\n1\n"
    assert names(tmp_path) == ["a.csv"]


def test_a_draft_is_continued_without_what_was_half_written(tmp_path: Path) -> None:
    path = tmp_path / "[a].csv"
    sink = begin(path)
    sink._file.write(b"hal")
    sink.close()
    (tmp_path / f".{sink._state.name}-xy").touch()  # a state in the making
    again = begin(path, pieces=0)
    assert (again.pieces, again.rows, again.reasons) == (2, 2, Counter({"empty": 1}))
    again.append(b"2\n", 1, Counter())
    again.complete()
    again.close()
    assert path.read_text() == "head\n0\n1\n2\n"
    assert names(tmp_path) == ["[a].csv"]


def test_another_key_starts_anew_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begin(tmp_path / "a.csv").close()
    again = begin(tmp_path / "a.csv", key=2, pieces=1)
    assert "an earlier run stopped with another model, file or option; starting anew" in caplog.text
    again.complete()
    again.close()
    assert (tmp_path / "a.csv").read_text() == "head\n0\n"


def test_a_draft_that_was_cut_is_not_continued(tmp_path: Path) -> None:
    sink = begin(tmp_path / "a.csv")
    sink.close()
    os.truncate(sink._draft, 3)
    again = begin(tmp_path / "a.csv", pieces=0)
    assert again.pieces == 0
    again.close()


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    first = begin(tmp_path / "a.csv")
    with pytest.raises(ConfigError, match=r"another process is writing .*a\.csv"):
        begin(tmp_path / "a.csv")
    first.close()
    begin(tmp_path / "a.csv", pieces=0).close()


def test_nothing_is_left_of_a_run_without_a_row(tmp_path: Path) -> None:
    begin(tmp_path / "a.csv", pieces=0).close()
    assert names(tmp_path) == []


def test_drafts_that_nobody_continues_are_removed_after_a_week(tmp_path: Path) -> None:
    for name in ("old.csv", "new.csv"):
        begin(tmp_path / name).close()
    week_ago = time.time() - 8 * 86400
    for path in tmp_path.glob(".old*"):
        os.utime(path, (week_ago, week_ago))
    begin(tmp_path / "a.csv", pieces=0).close()
    assert names(tmp_path) == [".new.csv.lightning_bge_draft", ".new.csv.lightning_bge_draft.json"]
