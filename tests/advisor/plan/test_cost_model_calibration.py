"""Which hyperparameters decide the cost of a trial, and how it is estimated from measured trials."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lightning_bge.advisor.plan.cost_model import (
    Calibration,
    MeasuredTrial,
    ParameterSets,
    TrialCost,
    choose_different,
    distance,
    features,
)
from lightning_bge.hpo.space.parameter_sets import draw_parameter_sets
from lightning_bge.hpo.space.search_space import parse_space

COST = TrialCost(start=1.0, fold=10.0, epoch=4.0, train=100.0, validation=20.0, pause=3.0, resume=7.0, epochs=2)
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


def test_hyperparameters_without_effect_on_the_cost_are_no_features() -> None:
    params = {"model.optimizer.lr": 1e-4, "model.dropout": 0.1, "data.batch_size": 16, "data.max_length": 512}
    params |= {"model.loss.name": "focal", "model.frozen_layers": 1}
    found = features(params, SPACE)
    assert set(found) == {"model.dropout", "data.batch_size", "data.max_length", "model.frozen_layers"}
    assert found["model.dropout"] is True
    assert found["data.batch_size"] == 0.0
    assert found["data.max_length"] == 1.0
    assert found["model.frozen_layers"] == 0.25
    assert distance(found, found) == 0
    other = features(params | {"data.batch_size": 32, "data.max_length": 64, "model.frozen_layers": None}, SPACE)
    assert distance(found, other) == 3


def test_measured_trials_cover_what_decides_the_cost() -> None:
    chosen = choose_different(ParameterSets(SPACE, draw_parameter_sets(SPACE, [], 200), 2), 8)
    seen = {(params["model.dropout"] > 0, params["data.batch_size"]) for params in chosen}
    assert seen == {(False, 16), (False, 32), (True, 16), (True, 32)}
    lengths = [features(params, SPACE)["data.max_length"] for params in chosen]
    assert min(lengths) < 0.1
    assert max(lengths) > 0.9


def test_the_cost_is_that_of_the_most_similar_measured_trials() -> None:
    parameter_sets = [{"data.batch_size": size} for size in (16, 32)]
    space = parse_space({"data.batch_size": {"choices": [16, 32]}, "trainer.max_epochs": {"low": 1, "high": 5}})
    trials = tuple(
        MeasuredTrial(params, features(params, space), replace(COST, train=train), 1.0, 0.01, 0.1)
        for params, train in zip(parameter_sets, (100.0, 200.0), strict=True)
    )
    known = Calibration(trials)
    assert known.cost({"data.batch_size": 16, "trainer.max_epochs": 3}, space, 9).train == pytest.approx(100, rel=0.02)
    assert known.cost({"data.batch_size": 32}, space, 9).train == pytest.approx(200, rel=0.02)
    assert known.cost({"data.batch_size": 16, "trainer.max_epochs": 3}, space, 9).epochs == 3
    assert known.cost({"data.batch_size": 16}, space, 9).epochs == 9
    assert known.error == pytest.approx(math.sqrt(0.02) / 2)


def test_steps_are_those_of_all_measured_trials() -> None:
    small, large = (MeasuredTrial({}, {}, replace(COST, train=train), 1.0, 0.01, 0.0) for train in (60.0, 80.0))
    assert Calibration((small, large), steps=150).step_s == 140 / 2 / 150
