"""Warnings about the study and the measurement."""

from __future__ import annotations

from lightning_bge.advisor.plan.cost_model import Calibration, MeasuredTrial, TrialCost
from lightning_bge.advisor.plan.what_if import check_calibration, check_study
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Steps


def test_patience_around_hyperband_and_a_timeout_are_warnings() -> None:
    hpo = StudyConfig(12, {}, pruner=PrunerConfig("hyperband", patience=2), timeout=10800.0)
    [patience, timeout], pruner = check_study(hpo, Steps(3, 6))
    assert pruner == hpo.pruner
    assert "never pruned, however bad it is" in patience
    assert "ends each call of hpo after 10800 s" in timeout


def test_nested_cross_validation_is_a_warning_with_its_price() -> None:
    [nested], _ = check_study(StudyConfig(12, {}, outer_folds=5), Steps(3, 6))
    assert "5 inner studies before the final one, about 6 times the hours; these figures are of the final" in nested


def test_an_uncertain_measurement_is_a_warning() -> None:
    trial = MeasuredTrial({}, {}, TrialCost(0.0, 0.0, 0.0, 1.0, 1.0), 1.0, 0.1, 0.3)
    memory, few, error = check_calibration(Calibration((trial,), out_of_memory=2, took=9.0))
    assert "2 of 3 parameter sets ran out of memory" in memory
    assert "only one parameter set" in few
    assert "30%" in error
    exact = MeasuredTrial({}, {}, trial.cost, 1.0, 0.1, 0.01)
    assert check_calibration(Calibration((exact, exact), took=9.0)) == []
