"""Studies whose hours are known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lightning_bge.advisor.plan import predict as module
from lightning_bge.advisor.plan.calibrate import Calibration, Draw, choose_draws, distance, features
from lightning_bge.advisor.plan.cost_model import TrialCost
from lightning_bge.advisor.plan.predict import Priced, Study, pools, predict, seconds_of
from lightning_bge.hpo.analysis.history import History, PastTrial, StudyGoal
from lightning_bge.hpo.forecast.recording import Curve, Recording
from lightning_bge.hpo.forecast.replay import replay_asha
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.pruning.halving import rung_steps
from lightning_bge.hpo.space.parameter_sets import draw_parameter_sets
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.steps import Report, Steps
from lightning_bge.hpo.study import quiet_optuna
from tests.helpers.paths import CURVES

quiet_optuna()
COST = TrialCost(visit=1.0, fold=10.0, epoch=4.0, train=100.0, validation=20.0, pause=3.0, resume=7.0, epochs=2)
SPACE = parse_space(
    {
        "model.optimizer.lr": {"low": 1e-5, "high": 1e-3, "log": True},
        "model.dropout": {"choices": [0.0, 0.1, 0.3]},
        "data.batch_size": {"choices": [16, 32]},
        "data.max_length": {"low": 64, "high": 512, "log": True},
        "model.loss.name": {"choices": ["bce", "focal"]},
        "model.frozen_layers": {"low": 0, "high": 4, "when": {"data.batch_size": 16}},
    }
)
NONE = PrunerConfig("none")


def calibration(cost: TrialCost = COST, error: float = 0.0, **changes: Any) -> Calibration:
    return Calibration((Draw({}, {}, cost, 1.0, 0.01, error),), steps=100, **changes)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRIFT", 0.0)


@pytest.mark.usefixtures("exact")
def test_without_pruning_and_without_noise_the_hours_are_exact() -> None:
    known = calibration(start=30.0, first=5.0, finish=40.0, refit_epoch=150.0)
    study = Study(12, Steps(2, 2), NONE, learns=False)
    found = predict(study, Priced([COST]), known)
    full = 12 * (1 + 2 * 10 + 4 * 124)
    # the refit trains 0.8 x 2 epochs on average
    expected = full + 30 + 5 + 40 + 1.6 * 150
    assert found.low == found.mid == found.high == expected
    assert (found.full, found.search, found.share, found.complete) == (full, full, (1.0, 1.0, 1.0), 12)
    assert predict(replace(study, refit=False), Priced([COST]), known).mid == expected - 240
    assert predict(replace(study, seeds=2), Priced([COST]), known).mid == expected + 10 * full / 12
    assert predict(replace(study, compile_s=60.0), Priced([COST]), known).mid == expected + 60
    assert predict(replace(study, survival=0.25), Priced([COST]), known).search == full / 4


@pytest.mark.usefixtures("exact")
def test_workers_share_the_trials() -> None:
    study = Study(12, Steps(1, 2), NONE, workers=5, refit=False)
    each = COST.total(Steps(1, 2))
    found = predict(study, Priced([COST]), calibration())
    assert found.mid == 3 * each  # 5 + 5 + 2
    assert found.search == 12 * each


@pytest.mark.usefixtures("exact")
def test_enqueued_points_come_first_and_the_others_are_drawn() -> None:
    slow, fast = replace(COST, train=1000.0), replace(COST, train=0.0)
    study = Study(3, Steps(1, 1), NONE, refit=False)
    found = predict(study, Priced([slow, slow, fast], first=2), calibration())
    assert found.mid == 2 * slow.total(Steps(1, 1)) + fast.total(Steps(1, 1))


@pytest.mark.usefixtures("exact")
def test_promoted_trials_pay_for_pausing_and_for_going_on() -> None:
    # equal costs, and four points with one rung: one of them goes on, after a pause or without one
    study = Study(4, Steps(1, 2), PrunerConfig(), learns=False, refit=False)
    found = predict(study, Priced([COST]), calibration())
    reports = 4 * (1 + 10 + 124) + 124
    paused = reports + 1 + 7 + 10  # another visit, the checkpoint read, the fold begun again
    assert reports <= found.low <= found.mid <= found.high <= paused + 4 * 3
    assert 0.5 < found.share[1] < 1


def test_the_range_grows_with_what_is_not_known() -> None:
    study = Study(20, Steps(2, 2), NONE, refit=False)
    sure, unsure = (predict(study, Priced([COST]), calibration(error=error)) for error in (0.0, 0.2))
    width = (sure.high - sure.low) / sure.mid
    assert 0.06 < width < 0.15  # the machine's drift: 2 x 1.28 x 4 %
    assert (unsure.high - unsure.low) / unsure.mid > 3 * width


@pytest.mark.parametrize("name", ["trecqa", "sick", "sample"])
def test_the_range_holds_as_often_as_it_says(name: str) -> None:
    """Truth: the recorded trials in random orders by the replay's own rules, on a machine that drifts."""
    recording = Recording.load(CURVES / f"{name}.json").coarser(1)
    steps, count = Steps(recording.folds, recording.epochs), len(recording.trials)
    seconds = {curve.number: curve.seconds for curve in recording.trials}
    mean = np.mean([np.sum(values) for values in seconds.values()]) / steps.total
    cost = TrialCost(0.0, 0.0, 0.0, mean, 0.0, epochs=recording.epochs)
    study = Study(count, steps, PrunerConfig(), learns=False, refit=False, curves=recording)
    found = predict(study, Priced([cost]), calibration(cost, error=0.01))
    random, inside = np.random.default_rng(0), 0
    for _ in range(40):
        run = replay_asha(recording, rung_steps(steps.total, 1, 4), 4, random.permutation(count))
        # what a process does once is in the first recorded trial's seconds: all reports at the mean
        truth = sum(run.steps) * mean * (1 + 0.04 * random.standard_normal())
        inside += found.low <= truth <= found.high
    assert 0.6 <= inside / 40 <= 0.97  # 0.8 in the long run


def test_a_pruner_of_optunas_is_asked_itself() -> None:
    steps = Steps(2, 4)
    priced = Priced([replace(COST, epochs=4)])
    whole, pruned, longer = (
        predict(Study(trials, steps, PrunerConfig(name), refit=False), priced, calibration())
        for name, trials in (("none", 40), ("median", 40), ("median", 400))
    )
    assert pruned.search < 0.8 * whole.search
    assert pruned.complete < 30
    assert longer.share[1] < pruned.share[1] + 0.05  # the bootstrap is a smaller part


def test_early_stopping_leaves_epochs_out() -> None:
    values = (0.5, 0.6, 0.6, 0.6, 0.7, 0.65, 0.65, 0.7, 0.7, 0.7)  # two folds; the second alone: 0.6, 0.6, 0.7, 0.7 ...
    curves = Recording("r", "maximize", 2, 5, 1, {}, (Curve(0, {}, 0.7, values, (1.0,) * 10, (0.0,) * 10),))
    study = Study(1, Steps(2, 5), NONE, patience=2, curves=curves)
    [pool] = pools(study)
    assert pool.trained.tolist() == [[True, True, True, True, False, True, True, True, True, True]]
    assert pools(replace(study, patience=None))[0].trained.all()


def test_curves_of_another_length_are_stretched() -> None:
    curves = Recording("r", "minimize", 1, 4, 1, {}, (Curve(0, {}, 0.1, (0.4, 0.3, 0.2, 0.1), (1.0,) * 4, (0.0,) * 4),))
    [pool] = pools(Study(1, Steps(1, 2), NONE, curves=curves))
    assert pool.values.tolist() == [[-0.3, -0.1]]
    [pool] = pools(Study(1, Steps(1, 6), NONE, curves=curves))
    assert pool.values.tolist() == [[-0.4, -0.3, -0.3, -0.2, -0.1, -0.1]]


# ---------------------------------------------------------------------- which draws stand for which trials


def test_settings_that_cost_nothing_are_no_features() -> None:
    point = {"model.optimizer.lr": 1e-4, "model.dropout": 0.1, "data.batch_size": 16, "data.max_length": 512}
    point |= {"model.loss.name": "focal", "model.frozen_layers": 1}
    found = features(point, SPACE)
    assert set(found) == {"model.dropout", "data.batch_size", "data.max_length", "model.frozen_layers"}
    assert found["model.dropout"] is True
    assert found["data.batch_size"] == 0.0
    assert found["data.max_length"] == 1.0
    assert found["model.frozen_layers"] == 0.25
    assert distance(found, found) == 0
    other = features(point | {"data.batch_size": 32, "data.max_length": 64, "model.frozen_layers": None}, SPACE)
    assert distance(found, other) == 3


def test_draws_cover_what_decides_the_cost() -> None:
    chosen = choose_draws(draw_parameter_sets(SPACE, [], 200), SPACE, 8)
    seen = {(point["model.dropout"] > 0, point["data.batch_size"]) for point in chosen}
    assert seen == {(False, 16), (False, 32), (True, 16), (True, 32)}
    lengths = [features(point, SPACE)["data.max_length"] for point in chosen]
    assert min(lengths) < 0.1
    assert max(lengths) > 0.9


def test_a_trial_takes_what_the_draws_most_like_it_took() -> None:
    points = [{"data.batch_size": size} for size in (16, 32)]
    space = parse_space({"data.batch_size": {"choices": [16, 32]}, "trainer.max_epochs": {"low": 1, "high": 5}})
    draws = tuple(
        Draw(point, features(point, space), replace(COST, train=train), 1.0, 0.01, 0.1)
        for point, train in zip(points, (100.0, 200.0), strict=True)
    )
    known = Calibration(draws)
    assert known.cost({"data.batch_size": 16, "trainer.max_epochs": 3}, space, 9).train == pytest.approx(100, rel=0.02)
    assert known.cost({"data.batch_size": 32}, space, 9).train == pytest.approx(200, rel=0.02)
    assert known.cost({"data.batch_size": 16, "trainer.max_epochs": 3}, space, 9).epochs == 3
    assert known.cost({"data.batch_size": 16}, space, 9).epochs == 9
    assert known.error == pytest.approx(math.sqrt(0.02) / 2)


# ---------------------------------------------------------------------- given what the trials really did


def past(number: int, outcome: Any, reports: int, **changes: Any) -> PastTrial:
    curve = tuple(Report(step, 0.5, 1.0, 1.0, 1.0, 1.0) for step in range(1, reports + 1))
    return PastTrial(
        number, outcome, values={step: 0.9 - number / 10 for step in range(1, reports + 1)}, curve=(curve,), **changes
    )


def test_the_real_reports_give_the_seconds() -> None:
    steps = Steps(2, 2)
    trials = (
        past(0, "resumed", 1),
        past(1, "paused", 1),
        past(2, "paused", 1),
        past(3, "paused", 1),
        past(4, "complete", 4, resumes=0),
    )
    space = parse_space({"model.optimizer.lr": {"low": 0.0, "high": 1.0}})
    history = History(StudyGoal("f1"), steps, 4, "asha", {}, trials, (), None)  # type: ignore[arg-type]
    known = calibration(start=30.0, first=5.0, finish=40.0, refit_epoch=150.0)
    found = seconds_of(known, space, PrunerConfig(), history, refit_epochs=1)
    # of four points one can go on: only the first was among the best one when it came, and wrote its checkpoint
    first = 4 * (1 + 10 + 124) + 3
    rest = 1 + (7 + 10) + 124 + (10 + 124) + 124  # its fold once more, its second epoch, the other fold
    assert found == 30 + 5 + 40 + 150 + first + rest


def test_what_early_stopping_left_out_cost_nothing() -> None:
    trial = replace(past(0, "complete", 4), curve=(past(0, "complete", 3).curve[0],))
    history = History(StudyGoal("f1"), Steps(2, 2), 1, "none", {}, (trial,), (), None)  # type: ignore[arg-type]
    space = parse_space({"model.optimizer.lr": {"low": 0.0, "high": 1.0}})
    assert seconds_of(calibration(), space, NONE, history, 0) == 1 + 2 * 10 + 3 * 124
