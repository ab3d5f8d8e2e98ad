"""Simulated studies whose truth is known: the corrected score is right where the selected one is not.

The short form of `examples/benchmarks/selection_bias.py`, which calls the function that `lightning-bge hpo` calls.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from tests.helpers.paths import BENCHMARKS

REPETITIONS = 8


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import selection_bias
    finally:
        sys.path.remove(str(BENCHMARKS))
    return selection_bias


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"epochs": 4},
        {"metric": "f1", "tuned": True},
        {"group": 5},
        {"epochs": 3, "pruned": True},
    ],
)
def test_equally_good_trials(simulation: ModuleType, changes: dict[str, object]) -> None:
    found = simulation.run(replace(simulation.Scenario("short"), **changes), REPETITIONS, 100)
    noise = 2 * found["corrected_spread"] / REPETITIONS**0.5  # of the mean of so few repetitions
    assert found["selected"] > 0.02
    assert abs(found["corrected"]) < found["selected"] / 5 + noise < found["selected"]
    assert found["covered"] == 1
    assert found["width"] < 1.8
    assert 2 <= found["complete"] <= 4 if changes.get("pruned") else found["complete"] == 40


def test_trials_of_unequal_quality(simulation: ModuleType) -> None:
    found = simulation.run(replace(simulation.Scenario("short"), spread=0.1), REPETITIONS, 100)
    # the mean of 8 errors, each about as large as the standard error of a fresh test set
    assert abs(found["corrected"]) < (0.5 + 2 / REPETITIONS**0.5) * found["standard_error"]


def test_what_the_simulation_takes_for_the_truth_is_the_truth(simulation: ModuleType) -> None:
    random = np.random.default_rng(0)
    for metric, positive in (("accuracy", 0.5), ("f1", 0.2)):
        scenario = simulation.Scenario("s", metric=metric, positive=positive)
        labels = (random.random(400_000) < positive).astype(np.float32)
        logits = simulation.outputs(scenario, 0.7, labels, random)
        expected = simulation.value(scenario, logits, labels, 0.3)
        assert simulation.truth(scenario, 0.7, 0.3) == pytest.approx(expected, abs=0.003)


def test_pruning_keeps_what_the_pruner_of_a_study_keeps(simulation: ModuleType) -> None:
    values = np.random.default_rng(0).normal(size=(40, 3))
    last = simulation.prune(values, 2)
    assert set(np.argsort(-values[:, 0])[:10]) <= set(np.flatnonzero(last > 0))  # asynchronous: some more came early
    assert 2 <= (last == 2).sum() <= 4
