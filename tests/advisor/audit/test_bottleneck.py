"""The one sentence that names the next bottleneck."""

from __future__ import annotations

from typing import Any

from lightning_bge.advisor.audit.bottleneck import next_step
from lightning_bge.advisor.audit.checks.row import Fix, Row, TimeSaved


def row(name: str, verdict: Any, mid: float | None = None, group: str = "compute", fix: Fix | None = None) -> Row:
    saved = None if mid is None else TimeSaved(mid - 0.01, mid, mid + 0.01, "measured", "")
    return Row(group, name, "", "", verdict, "evidence", saved, fix)


def test_the_next_step_is_the_one_that_saves_most() -> None:
    rows = [row("a", "improve", 0.1), row("b", "improve", 0.3, fix=Fix("do b", yaml="b: true")), row("c", "ok", 0.9)]
    assert next_step(rows, {}, {}) == "Next: b: do b (b: true). This saves 30% of a step's time (29% to 31%, measured)."


def test_a_mismatch_comes_first_where_nothing_is_known_to_save_time() -> None:
    found = next_step([row("dropout", "mismatch", fix=Fix("call .train()"))], {}, {})
    assert found == "Next: dropout is not in effect as requested (evidence): call .train()."


def test_the_saving_of_a_search_is_of_its_training() -> None:
    found = next_step([row("pruning", "improve", 0.7, "search", Fix("prune"))], {}, {})
    assert "70% of the search's training" in found


def test_when_nothing_is_left_it_states_what_most_time_is_spent_on() -> None:
    found = next_step([row("a", "ok", 0.4), row("b", "improve", 0.01)], {"matrix products": 30.0, "host": 10.0}, {})
    assert found.startswith("No measured option saves more than 2% of a step's time")
    assert "matrix products (75%)" in found


def test_without_a_measured_row_it_states_that_none_was_measured() -> None:
    assert next_step([row("a", "ok")], {"host": 1.0}, {}).startswith(
        "The observed steps show nothing to improve; no option"
    )


def test_the_distance_to_the_hardwares_peak_is_part_of_the_answer() -> None:
    found = next_step([], {"attention": 1.0}, {"share": 0.33, "dtype": "bf16"})
    assert found.endswith("attention (100%); matrix products reach 33% of this machine's peak in bf16.")
