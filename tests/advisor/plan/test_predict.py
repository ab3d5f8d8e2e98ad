"""Predictions of studies whose hours are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lightning_bge.advisor.plan import predict as module
from lightning_bge.advisor.plan.cost_model import Calibration, MeasuredTrial, TrialCost
from lightning_bge.advisor.plan.predict import Scenario, StudyCosts, learning_curves, predict
from lightning_bge.hpo.forecast.recording import Curve, Recording
from lightning_bge.hpo.forecast.replay import replay_asha
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.pruning.halving import rung_steps
from lightning_bge.hpo.scheduling.trial_loop import quiet_optuna
from lightning_bge.hpo.steps import Steps
from tests.helpers.paths import CURVES

quiet_optuna()
COST = TrialCost(start=1.0, fold=10.0, epoch=4.0, train=100.0, validation=20.0, pause=3.0, resume=7.0, epochs=2)
NONE = PrunerConfig("none")


def study_costs(*trials: TrialCost, enqueued: int = 0, error: float = 0.0, **changes: Any) -> StudyCosts:
    """Costs of these parameter sets, `COST` if there are none."""
    trials = trials or (COST,)
    known = Calibration((MeasuredTrial({}, {}, trials[0], 1.0, 0.01, error),), steps=100, **changes)
    return StudyCosts(trials, known, enqueued)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRIFT", 0.0)


@pytest.mark.usefixtures("exact")
def test_without_pruning_and_without_noise_the_hours_are_exact() -> None:
    costs = study_costs(start=30.0, first_trial=5.0, end=40.0, refit_epoch=150.0)
    study = Scenario(12, Steps(2, 2), NONE, learns=False)
    found = predict(study, costs)
    full = 12 * (1 + 2 * 10 + 4 * 124)
    # the refit trains 0.8 x 2 epochs on average
    expected = full + 30 + 5 + 40 + 1.6 * 150
    assert found.low == found.mid == found.high == expected
    assert (found.unpruned, found.pruned, found.share, found.complete) == (full, full, (1.0, 1.0, 1.0), 12)
    assert predict(replace(study, refit=False), costs).mid == expected - 240
    assert predict(replace(study, seed_replicates=2), costs).mid == expected + 10 * full / 12
    assert predict(study, replace(costs, compile_s=60.0)).mid == expected + 60


@pytest.mark.usefixtures("exact")
def test_workers_share_the_trials() -> None:
    study = Scenario(12, Steps(1, 2), NONE, workers=5, refit=False)
    each = COST.total(Steps(1, 2))
    found = predict(study, study_costs())
    assert found.mid == 3 * each  # 5 + 5 + 2
    assert found.pruned == 12 * each


@pytest.mark.usefixtures("exact")
def test_enqueued_parameter_sets_come_first_and_the_others_are_drawn() -> None:
    slow, fast = replace(COST, train=1000.0), replace(COST, train=0.0)
    study = Scenario(3, Steps(1, 1), NONE, refit=False)
    found = predict(study, study_costs(slow, slow, fast, enqueued=2))
    assert found.mid == 2 * slow.total(Steps(1, 1)) + fast.total(Steps(1, 1))


@pytest.mark.usefixtures("exact")
def test_resumed_trials_pay_for_their_pause() -> None:
    # equal costs, and four parameter sets with one rung: one of them continues, with or without a pause
    study = Scenario(4, Steps(1, 2), PrunerConfig(), learns=False, refit=False)
    found = predict(study, study_costs())
    reports = 4 * (1 + 10 + 124) + 124
    paused = reports + 1 + 7 + 10  # begun a second time, the checkpoint read, the fold started a second time
    assert reports <= found.low <= found.mid <= found.high <= paused + 4 * 3
    assert 0.5 < found.share[1] < 1


def test_the_interval_grows_with_the_error_of_the_measurement() -> None:
    study = Scenario(20, Steps(2, 2), NONE, refit=False)
    exact, inexact = (predict(study, study_costs(error=error)) for error in (0.0, 0.2))
    width = (exact.high - exact.low) / exact.mid
    assert 0.06 < width < 0.15  # of the drift of the machine
    assert (inexact.high - inexact.low) / inexact.mid > 3 * width


@pytest.mark.parametrize("name", ["trecqa", "sick", "sample"])
def test_the_interval_holds_about_eight_times_in_ten(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the recorded trials in random orders by the rules of the replay, on a machine that drifts."""
    recording = Recording.load(CURVES / f"{name}.json").coarser(1)
    steps, count = Steps(recording.folds, recording.epochs), len(recording.trials)
    seconds = {curve.number: curve.seconds for curve in recording.trials}
    mean = np.mean([np.sum(values) for values in seconds.values()]) / steps.total
    cost = TrialCost(0.0, 0.0, 0.0, mean, 0.0, epochs=recording.epochs)
    study = Scenario(count, steps, PrunerConfig(), learns=False, refit=False)
    monkeypatch.setattr(module, "sample_curves", lambda *_: recording)
    found = predict(study, study_costs(cost, error=0.01))
    random, inside = np.random.default_rng(0), 0
    for _ in range(40):
        run = replay_asha(recording, rung_steps(steps.total, 1, 4), 4, random.permutation(count))
        # the first recorded trial has the seconds of what a process does once, so that all reports take the mean
        truth = sum(run.steps) * mean * (1 + 0.04 * random.standard_normal())
        inside += found.low <= truth <= found.high
    assert 0.6 <= inside / 40 <= 0.97  # 0.8 in the long run


def test_pruners_of_optuna_prune_in_the_simulation() -> None:
    steps = Steps(2, 4)
    costs = study_costs(replace(COST, epochs=4))
    whole, pruned, longer = (
        predict(Scenario(trials, steps, PrunerConfig(name), refit=False), costs)
        for name, trials in (("none", 40), ("median", 40), ("median", 400))
    )
    assert pruned.pruned < 0.8 * whole.pruned
    assert pruned.complete < 30
    assert longer.share[1] < pruned.share[1] + 0.05  # the first trials, which are not pruned, are a smaller part


def test_early_stopping_leaves_epochs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    values = (0.5, 0.6, 0.6, 0.6, 0.7, 0.65, 0.65, 0.7, 0.7, 0.7)  # two folds; the second alone: 0.6, 0.6, 0.7, 0.7 ...
    recorded = Recording("r", "maximize", 2, 5, 1, {}, (Curve(0, {}, 0.7, values, (1.0,) * 10, (0.0,) * 10),))
    study = Scenario(1, Steps(2, 5), NONE, patience=2)
    monkeypatch.setattr(module, "sample_curves", lambda *_: recorded)
    assert learning_curves(study)[0].trained.tolist() == [[True, True, True, True, False, True, True, True, True, True]]
    assert learning_curves(replace(study, patience=None))[0].trained.all()
    # 0.6 is better than 0.5 by less than this, and 0.7 than the 0.6 of the second fold
    stopped = learning_curves(replace(study, min_delta=0.25))[0].trained
    assert stopped.tolist() == [[True, True, True, False, False, True, True, True, False, False]]


def test_curves_of_another_length_are_stretched(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recording(
        "r", "minimize", 1, 4, 1, {}, (Curve(0, {}, 0.1, (0.4, 0.3, 0.2, 0.1), (1.0,) * 4, (0.0,) * 4),)
    )
    monkeypatch.setattr(module, "sample_curves", lambda *_: recorded)
    assert learning_curves(Scenario(1, Steps(1, 2), NONE))[0].values.tolist() == [[-0.3, -0.1]]
    curves = learning_curves(Scenario(1, Steps(1, 6), NONE))[0]
    assert curves.values.tolist() == [[-0.4, -0.3, -0.3, -0.2, -0.1, -0.1]]
