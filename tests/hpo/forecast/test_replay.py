"""Replays of recorded searches against real studies and plain arithmetic."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.pruners import NopPruner
from optuna.trial import TrialState

from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.forecast.preview import sample_curves
from lightning_bge.hpo.forecast.recording import Curve, Recording, record_study
from lightning_bge.hpo.forecast.replay import policy_of, replay_asha, replay_pruned
from lightning_bge.hpo.pruning.asha import AshaPruner
from lightning_bge.hpo.pruning.config import PrunerConfig, build_pruner
from lightning_bge.hpo.pruning.halving import rung_steps
from lightning_bge.hpo.space.draw import SamplerConfig
from lightning_bge.hpo.steps import Steps
from tests.helpers.curve_objective import SPACE, CurveObjective
from tests.helpers.plain_halving import plain_halving
from tests.helpers.study_run import run_study

optuna.logging.set_verbosity(optuna.logging.WARNING)
STEPS = Steps(3, 2, 2)


def by_hand(values: list[list[float]], seconds: float = 1.0, direction: Any = "maximize") -> Recording:
    n = len(values[0])
    trials = tuple(
        Curve(number, {}, row[-1], tuple(row), (seconds,) * n, (0.0,) * n) for number, row in enumerate(values)
    )
    return Recording("hand", direction, 1, n, 1, {}, trials)


def test_a_trial_that_ended_by_a_nan_is_recorded_and_replayed() -> None:
    study = optuna.create_study(direction="maximize")
    curve = [[[1, 0.5, 1.0, 0.2, 1.0, 0.2], [2, float("nan"), 1.0, 0.2, 1.0, 0.2]]]
    attributes = {"nan": "nan", "curve": curve}
    study.add_trial(
        optuna.trial.create_trial(state=TrialState.PRUNED, intermediate_values={1: 0.5}, user_attrs=attributes)
    )
    [trial] = record_study(study, "n", 1, 4, 1).trials
    assert trial.value is None
    assert trial.seconds == (1.2, 1.2)
    recording = Recording("n", "maximize", 1, 4, 1, {}, (trial, Curve(1, {}, 0.4, (0.4,) * 4, (1.0,) * 4, (0.0,) * 4)))
    for run in (replay_pruned(recording, NopPruner(), [0, 1]), replay_asha(recording, [1], 2, [0, 1])):
        assert run.seconds == pytest.approx(6.4)
        assert run.steps == (2, 4)
        assert [value for _, value in run.found] == [0.4]


@pytest.mark.parametrize("name", ["hyperband", "median", "percentile", "none"])
def test_a_replay_equals_a_real_study(name: Any) -> None:
    recording = sample_curves(40, STEPS)
    order = list(range(40))
    random.Random(0).shuffle(order)
    config = PrunerConfig(name)
    run = policy_of(config, 40, STEPS)(recording, order, "fixed")
    study = optuna.create_study(study_name="fixed", direction="maximize", pruner=build_pruner(config, 40, STEPS))

    def objective(trial: optuna.Trial) -> float:
        values = recording.trials[order[trial.number]].values
        for step, value in enumerate(values, start=1):
            trial.report(value, step)
            if step < len(values) and trial.should_prune():
                raise optuna.TrialPruned
        return values[-1]

    study.optimize(objective, n_trials=40)
    assert run.steps == tuple(trial.last_step for trial in study.trials)
    assert [value for _, value in run.found] == [t.value for t in study.trials if t.state is TrialState.COMPLETE]
    assert run.seconds == sum(run.steps)


def test_a_replay_of_asha_equals_a_plain_version_of_the_paper() -> None:
    recording = sample_curves(40, STEPS)
    order = list(range(40))
    random.Random(1).shuffle(order)
    steps = rung_steps(12, 1, 3)
    made, ended = plain_halving([list(recording.trials[place].values) for place in order], list(steps), 3)
    run = replay_asha(recording, steps, 3, order)
    assert run.steps == tuple(made)
    assert len(run.found) == ended
    assert run.seconds == sum(made)


def test_a_replay_of_asha_has_a_complete_trial_even_where_none_is_in_the_top_share() -> None:
    run = replay_asha(by_hand([[0.1] * 4, [0.2] * 4]), [1], 4, [0, 1])
    assert run.steps == (1, 4)
    assert run.found == ((5.0, 0.2),)


def test_nans_in_a_replay_of_asha_end_trials_as_in_a_study(tmp_path: Path) -> None:
    nan = float("nan")
    rows = [[0.65] * 6, [0.9, nan], [nan], [0.6] * 6, [0.7] * 6, [0.8, 0.8, 0.8, nan], [0.5] * 6, [0.75] * 6]
    trials = tuple(
        Curve(
            *(number, {}, row[-1] if len(row) == 6 else None, tuple(row)),
            *((1.0,) * len(row), (0.0,) * len(row)),
        )
        for number, row in enumerate(rows)
    )
    recording = Recording("n", "maximize", 1, 6, 1, {}, trials)
    run = replay_asha(recording, [1, 3], 2, range(8))
    study = optuna.create_study(direction="maximize", pruner=AshaPruner([1, 3], 2), study_name="s")
    objective = CurveObjective(rows)
    run_study(study, objective, StudyConfig(8, SPACE, sampler=SamplerConfig("random")), tmp_path)
    assert run.steps == tuple(objective.steps_made(study.trials))
    done = [trial.value for trial in study.trials if trial.state is TrialState.COMPLETE]
    assert [value for _, value in run.found] == done
