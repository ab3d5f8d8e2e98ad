"""The lines and the bar of a prediction."""

from __future__ import annotations

import pytest

from lightning_bge.prediction import progress
from lightning_bge.prediction.progress import RowProgressBar


def test_a_line_says_what_is_done_and_left() -> None:
    bar = RowProgressBar()
    bar.start(5000, 1000)
    assert bar.line(1.0) == "1,000 of 5,000 rows, 0 rows/s"
    bar.move_to(2000)
    assert bar.line(10.0) == "2,000 of 5,000 rows, 100 rows/s, 00:30 left"


def test_without_a_terminal_there_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = RowProgressBar()
    bar.start(100, 0)
    for second in range(25):
        now[0] = second
        bar.move_to(second)
    bar.stop()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["11 of 100 rows, 1 rows/s, 01:29 left", "22 of 100 rows, 1 rows/s, 01:18 left"]
    bar.disable()
    now[0] = 100.0
    bar.move_to(50)
    assert capsys.readouterr().err == ""


def test_in_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    bar = RowProgressBar()
    bar.start(100, 40)
    bar.move_to(70)
    bar.stop()
    out, err = capsys.readouterr()
    assert out == ""
    assert "predicting:  70%" in err
    assert "70/100 [" in err
    assert " rows/s]" in err
