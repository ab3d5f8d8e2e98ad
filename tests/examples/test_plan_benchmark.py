"""What the benchmark of plans reads from a search's output, and how it judges."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import BENCHMARKS as FOLDER

# the record's versions and hardware are taken with transformers' Trainer at hand
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("accelerate", reason="the benchmarks' shared module imports transformers' Trainer")
    monkeypatch.syspath_prepend(FOLDER)
    import plan_accuracy

    return plan_accuracy


LINES = [
    (100.0, "study s: 6 trials, a single split, at most 2 epochs each"),
    (110.0, "[1/6] trial 0 done: f1 0.5 | 0 pruned | best 0.5 (trial 0) | 0:00:10 passed"),
    (
        120.0,
        "[2/6] trial 1 done: f1 0.5 | 0 pruned | 0:00:20 passed, about 0:00:40 left (0:00:30 to 0:01:00)",
    ),
    (
        130.0,
        "[3/6] trial 2 done: f1 0.5 | 0 pruned | 0:00:30 passed, about 0:00:30 left (0:00:25 to 0:00:35)",
    ),
    (
        140.0,
        "[4/6] trial 3 done: f1 0.5 | 0 pruned | 0:00:40 passed, about 1:00:20 left (0:00:15 to 2:00:25)",
    ),
    (150.0, "[5/6] trial 4 done: f1 0.5 | 0 pruned | 0:00:50 passed, about 0:00:10 left"),
]


def test_the_time_left_is_that_after_a_third_of_the_lines_that_say_one(benchmark: Any) -> None:
    assert benchmark.time_left(LINES, 175.0) == {"low": 25, "mid": 30, "high": 35, "true": 45.0}
    assert benchmark.time_left(LINES[3:5], 150.0)["true"] == 20.0
    assert benchmark.time_left(LINES[4:5], 150.0)["high"] == 7225
    assert benchmark.time_left(LINES[5:], 160.0) == {"low": 10, "mid": 10, "high": 10, "true": 10.0}


def one(pruner: str, mid: float, wall: float, **changes: Any) -> dict[str, Any]:
    left = {"low": 40.0, "mid": 50.0, "high": 60.0, "true": 55.0}
    found = {"folds": 2, "rows": 200, "pruner": pruner, "mid": mid, "low": 0.9 * mid, "high": 1.1 * mid, "wall": wall}
    return {**found, "given_reports": 95.0, "left": left, **changes}


def test_errors_are_shares_of_the_wall_and_ranges_hold_or_do_not(benchmark: Any) -> None:
    done = {"unpruned-1": one("none", 110.0, 100.0), "pruned-1": one("asha", 95.0, 100.0)}
    done["pruned-2"] = one("asha", 50.0, 100.0, left={"low": 40.0, "mid": 50.0, "high": 60.0, "true": 100.0})
    found = benchmark.judge(done)
    assert found["unpruned"] == [pytest.approx(0.1)]
    assert found["pruned_in_range"] == [True, False]
    assert found["pruned_given_reports"] == [pytest.approx(-0.05)] * 2
    assert found["left_in_range"] == [True, True, False]
    summary, plans, left = benchmark.sections(done, found)
    assert "the largest error is 10.0%" in summary
    assert "the range holds in 1 of 2" in summary
    assert "holds in 2 of 3" in summary
    assert "| +10.0% |" in plans
    assert "| -50.0% |" in left


def test_what_is_in_the_record_is_not_run_again(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def fake(given: argparse.Namespace, name: str, **kind: Any) -> dict[str, Any]:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(name)
        return one(kind["pruner"], 100.0, 100.0)

    monkeypatch.setattr(benchmark, "study", fake)
    (tmp_path / "model.safetensors").write_bytes(b"")
    out = tmp_path / "plan.json"
    words = ["--data", str(tmp_path), "--model", str(tmp_path), "--out", str(out), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["plan_accuracy", *words, "--unpruned", "1", "--pruned", "2"])
    with pytest.raises(KeyboardInterrupt):
        benchmark.main()
    assert list(json.loads(out.read_text())["studies"]) == ["unpruned-1", "pruned-1"]
    ran.clear()
    benchmark.main()
    assert ran == ["pruned-2"]
    assert "the range holds in 2 of 2" in out.with_suffix(".md").read_text()
