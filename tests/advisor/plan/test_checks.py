"""Warnings about the study, the measurement and a busy machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_bge.advisor.plan import checks
from lightning_bge.advisor.plan.calibration import Calibration, MeasuredTrial
from lightning_bge.advisor.plan.checks import OtherLoad, check_calibration, check_study
from lightning_bge.advisor.plan.cost_model import TrialCost
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Steps


def test_patience_around_hyperband_and_a_timeout_are_warnings() -> None:
    hpo = StudyConfig(12, {}, pruner=PrunerConfig("hyperband", patience=2), timeout=10800.0)
    [patience, timeout], pruner = check_study(hpo, Steps(3, 6))
    assert pruner == hpo.pruner
    assert "never pruned, however bad it is" in patience
    assert "ends each call of hpo after 10800 s" in timeout


def test_an_uncertain_measurement_is_a_warning() -> None:
    trial = MeasuredTrial({}, {}, TrialCost(0.0, 0.0, 0.0, 1.0, 1.0), 1.0, 0.1, 0.3)
    memory, few, error = check_calibration(Calibration((trial,), out_of_memory=2, took=9.0))
    assert "2 of 3 parameter sets ran out of memory" in memory
    assert "only one parameter set" in few
    assert "30%" in error
    exact = MeasuredTrial({}, {}, trial.cost, 1.0, 0.1, 0.01)
    assert check_calibration(Calibration((exact, exact), took=9.0)) == []


def test_a_busy_machine_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks, cores = os.sysconf("SC_CLK_TCK"), os.cpu_count() or 1
    own = iter([(1.0, 0.0, 0.0, 0.0, 0.0), (11.0, 0.0, 0.0, 0.0, 0.0)] * 3)
    times = iter([100.0, 110.0] * 3)
    monkeypatch.setattr(checks, "STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "times", lambda: next(own))
    monkeypatch.setattr(checks.time, "monotonic", lambda: next(times))

    def warnings(user: float, steal: float) -> list[str]:
        (tmp_path / "stat").write_text("cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 1\n")
        load = OtherLoad()
        (tmp_path / "stat").write_text(f"cpu  {user * ticks:.0f} 0 0 99 99 0 0 {steal * ticks:.0f} 0 0\ncpu0 1\n")
        return load.warnings()

    assert f"other processes used {cores:.1f} of the {cores} cores" in warnings(10 + 10 * cores, 0)[0]
    assert warnings(10, 0) == []
    assert "other processes used" in warnings(10, 10 * cores)[0]
