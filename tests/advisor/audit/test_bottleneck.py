"""Where a step's time goes, and the one sentence that names the next bottleneck."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_bge.advisor.audit.bottleneck import next_step, peak_share, step_parts
from lightning_bge.advisor.audit.observation import (
    FETCH,
    MOVE,
    RUN,
    Cycle,
    DeviceState,
    Observation,
    OptimizerSteps,
    StepTrace,
)
from lightning_bge.advisor.audit.requested import ObservedRun, Requested
from lightning_bge.advisor.audit.result import Fix, Row, TimeSaved


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


# ---------------------------------------------------------------------- the parts of a step's time


def observed(batches_per_step: int = 1, **parts: float) -> ObservedRun:
    """Batches of 100 ms: 10 ms of data, 80 ms of forward, backward and step, 10 ms between the batches."""
    cycle = Cycle({f"x.{FETCH}": 0.006, f"x.{MOVE}": 0.004, RUN: 0.08}, 0.1)
    trace = StepTrace(seconds=sum(parts.values()), flops=Counter(bf16=4 * 10**9))
    trace.parts.update({name.replace("_", " "): seconds for name, seconds in parts.items()})
    seen = Observation(
        cycles=[cycle] * 5,
        steps=OptimizerSteps(batches=Counter({batches_per_step: 3})),
        traces=[trace],
        device=DeviceState(peak_flops=2e11),
    )
    objects: Any = SimpleNamespace()
    return ObservedRun(seen, Requested(), objects, objects)


def test_parts_that_the_trace_slowed_down_are_scaled_to_the_time_without_one() -> None:
    found = step_parts(observed(matrix_products=0.09, attention=0.03, host=0.02))
    assert sum(found.values()) == pytest.approx(100)
    assert found["matrix products"] == pytest.approx(45)
    assert found["attention"] == pytest.approx(15)
    assert found["host"] == pytest.approx(20)
    assert found["data wait"] == pytest.approx(10)
    assert found["callbacks and loop"] == pytest.approx(10)


def test_parts_of_a_step_of_several_batches_are_those_of_one_batch() -> None:
    found = step_parts(observed(batches_per_step=2, matrix_products=0.1, optimizer=0.02, host=0.04))
    assert found["matrix products"] == pytest.approx(50)
    assert found["optimizer"] == pytest.approx(10)
    assert found["host"] == pytest.approx(20)


def test_the_share_of_the_peak_is_of_the_whole_step() -> None:
    found = peak_share(observed(batches_per_step=2, matrix_products=0.1))
    assert found["achieved_gflops"] == pytest.approx(4 / 0.2)
    assert found["share"] == pytest.approx(0.1)
    assert found["dtype"] == "bf16"
