from __future__ import annotations

from typing import Any

import pytest

from lightning_bge.advisor.audit.checks_compute import Gain, Row
from lightning_bge.advisor.audit.scorecard import next_step, scores


def row(name: str, verdict: Any, mid: float | None = None, group: str = "compute", **more: Any) -> Row:
    gain = None if mid is None else Gain(mid - 0.01, mid, mid + 0.01, "measured", "")
    return Row(group, name, "", "", verdict, "evidence", gain, **more)


def test_a_score_is_the_time_that_would_be_left() -> None:
    rows = [row("a", "off", 0.5), row("b", "lie", 0.2), row("c", "ok", 0.9)]
    [found] = scores(rows, now_ms=100.0)
    assert found.score == pytest.approx(0.4)
    assert (found.now_ms, found.best_ms) == (100.0, pytest.approx(40.0))
    assert found.why == "a, b"


def test_a_category_without_a_row_that_says_something_has_no_score() -> None:
    assert scores([row("a", "not applicable"), row("b", "unknown")], 100.0) == []


def test_a_lie_of_unknown_gain_is_named_in_the_score() -> None:
    [found] = scores([row("a", "lie")], 100.0)
    assert found.score == 1.0
    assert "a (its gain is not known)" in found.why


def test_the_next_step_is_the_one_that_brings_most() -> None:
    rows = [row("a", "off", 0.1), row("b", "off", 0.3, advice="do b", yaml="b: true"), row("c", "ok", 0.9)]
    assert next_step(rows, {}) == "Next: b: do b (b: true); it brings 30% of a step's time (29% to 31%, measured)."


def test_a_lie_comes_first_where_nothing_is_known_to_bring_anything() -> None:
    assert "First mend what is not what it seems: dropout" in next_step([row("dropout", "lie", advice="wake it")], {})


def test_of_a_search_the_gain_is_of_its_training() -> None:
    found = next_step([row("pruning", "off", 0.7, "search", advice="prune")], {})
    assert "70% of the search's training" in found


def test_when_nothing_is_left_it_says_what_the_time_goes_into() -> None:
    found = next_step([row("a", "ok", 0.4), row("b", "off", 0.01)], {"matrix products": 30.0, "host": 10.0})
    assert found.startswith("Maxed out as far as was measured")
    assert "matrix products (75%)" in found
