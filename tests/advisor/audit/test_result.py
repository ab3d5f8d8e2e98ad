"""Scores by category."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_bge.advisor.audit.result import Row, TimeSaved, scores


def row(name: str, verdict: Any, mid: float | None = None) -> Row:
    saved = None if mid is None else TimeSaved(mid - 0.01, mid, mid + 0.01, "measured", "")
    return Row("compute", name, "", "", verdict, "evidence", saved)


def test_a_score_is_the_time_that_would_be_left() -> None:
    rows = [row("a", "improve", 0.5), row("b", "mismatch", 0.2), row("c", "ok", 0.9)]
    [found] = scores(rows, now_ms=100.0)
    assert found.score == pytest.approx(0.4)
    assert (found.now_ms, found.best_ms) == (100.0, pytest.approx(40.0))
    assert found.why == "a, b"


def test_a_category_without_a_row_that_applies_has_no_score() -> None:
    assert scores([row("a", "not applicable"), row("b", "unknown")], 100.0) == []


def test_a_mismatch_of_unknown_saving_is_named_in_the_score() -> None:
    [found] = scores([row("a", "mismatch")], 100.0)
    assert found.score == 1.0
    assert "a (its saving is not known)" in found.why
