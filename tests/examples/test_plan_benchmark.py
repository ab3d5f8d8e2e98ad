"""What the benchmark of plans reads from the output of a study, and how it computes errors."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lightning_bge.advisor.plan.cost_model import Calibration, MeasuredTrial, TrialCost
from lightning_bge.hpo.analysis.history import History, PastTrial, StudyGoal
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.steps import Report, Steps
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


def test_errors_are_shares_of_the_wall_time_and_intervals_contain_it_or_not(benchmark: Any) -> None:
    done = {"unpruned-1": one("none", 110.0, 100.0), "pruned-1": one("asha", 95.0, 100.0)}
    done["pruned-2"] = one("asha", 50.0, 100.0, left={"low": 40.0, "mid": 50.0, "high": 60.0, "true": 100.0})
    found = benchmark.judge(done)
    assert found["unpruned"] == [pytest.approx(0.1)]
    assert found["pruned_in_interval"] == [True, False]
    assert found["pruned_given_reports"] == [pytest.approx(-0.05)] * 2
    assert found["left_in_interval"] == [True, True, False]
    summary, plans, left = benchmark.sections(done, found)
    assert "the largest error is 10.0%" in summary
    assert "contains the wall time in 1 of 2 studies" in summary
    assert "contains it in 2 of 3 studies" in summary
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
    assert "contains the wall time in 2 of 2 studies" in out.with_suffix(".md").read_text()


# ---------------------------------------------------------------------- given what the trials really did


COST = TrialCost(start=1.0, fold=10.0, epoch=4.0, train=100.0, validation=20.0, pause=3.0, resume=7.0, epochs=2)
SPACE = parse_space({"model.optimizer.lr": {"low": 0.0, "high": 1.0}})


def calibration(**changes: Any) -> Calibration:
    return Calibration((MeasuredTrial({}, {}, COST, 1.0, 0.01, 0.0),), steps=100, **changes)


def past(number: int, outcome: Any, reports: int, **changes: Any) -> PastTrial:
    curve = tuple(Report(step, 0.5, 1.0, 1.0, 1.0, 1.0) for step in range(1, reports + 1))
    return PastTrial(
        number, outcome, values={step: 0.9 - number / 10 for step in range(1, reports + 1)}, curve=(curve,), **changes
    )


def test_the_real_reports_give_the_seconds(benchmark: Any) -> None:
    steps = Steps(2, 2)
    trials = (
        past(0, "resumed", 1),
        past(1, "paused", 1),
        past(2, "paused", 1),
        past(3, "paused", 1),
        past(4, "complete", 4, resumes=0),
    )
    history = History(StudyGoal("f1"), steps, 4, "asha", {}, trials, (), None)  # type: ignore[arg-type]
    known = calibration(start=30.0, first_trial=5.0, end=40.0, refit_epoch=150.0)
    found = benchmark.seconds_of(known, SPACE, PrunerConfig(), history, refit_epochs=1)
    # of four parameter sets one can be resumed: only the first was the best one at its pause and wrote its checkpoint
    first = 4 * (1 + 10 + 124) + 3
    rest = 1 + (7 + 10) + 124 + (10 + 124) + 124  # its fold started a second time, its second epoch, the other fold
    assert found == 30 + 5 + 40 + 150 + first + rest


def test_epochs_that_early_stopping_left_out_cost_nothing(benchmark: Any) -> None:
    trial = replace(past(0, "complete", 4), curve=(past(0, "complete", 3).curve[0],))
    history = History(StudyGoal("f1"), Steps(2, 2), 1, "none", {}, (trial,), (), None)  # type: ignore[arg-type]
    assert benchmark.seconds_of(calibration(), SPACE, PrunerConfig("none"), history, 0) == 1 + 2 * 10 + 3 * 124


def test_a_calibration_is_read_from_the_json_of_a_plan(benchmark: Any) -> None:
    known = calibration(start=30.0)
    assert benchmark.load_calibration(json.loads(json.dumps(asdict(known)))) == known
