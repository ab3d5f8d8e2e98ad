"""What a tracker is to have of a trial."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_bge.hpo.trackers.record import has_run, new_points, record_of, state_of
from tests.helpers.memory_tracker import STUDY

START = datetime(2026, 5, 4, 3, 2, 1, 5)


def trial(state: TrialState, number: int = 3, **attributes: Any) -> FrozenTrial:
    """A trial with one hyperparameter and two reports."""
    found = create_trial(
        state=state,
        value=0.5 if state == TrialState.COMPLETE else None,
        params={"model.optimizer.lr": 0.25},
        distributions={"model.optimizer.lr": FloatDistribution(0, 1)},
        user_attrs=attributes,
        intermediate_values={1: 0.25, 2: 0.5},
    )
    found.number, found.datetime_start = number, START
    return found


@pytest.mark.parametrize(
    ("state", "attributes", "expected"),
    [
        (TrialState.COMPLETE, {}, "complete"),
        (TrialState.PRUNED, {}, "pruned"),
        (TrialState.PRUNED, {"nan": "nan"}, "pruned"),
        (TrialState.PRUNED, {"oom_where": "fit", "paused_at": 2}, "pruned"),
        (TrialState.PRUNED, {"paused_at": 2}, "paused"),
        (TrialState.FAIL, {"error": "ValueError: x"}, "failed"),
        (TrialState.FAIL, {"worker_lost": "gone", "error": "3 workers died"}, "failed"),
        (TrialState.FAIL, {"worker_lost": "gone"}, "killed"),
        (TrialState.FAIL, {"interrupted": "SIGTERM"}, "killed"),
        (TrialState.FAIL, {}, "failed"),
        (TrialState.RUNNING, {}, None),
    ],
)
def test_how_a_trial_has_ended_in_one_word(state: TrialState, attributes: dict[str, Any], expected: str | None) -> None:
    assert state_of(trial(state, **attributes)) == expected


def test_a_record_holds_parameters_links_and_curves() -> None:
    curve = [
        [[1, 0.25, 0.0, 0.0, 0.0, 0.0, 1.5], [2, math.nan, 0.0, 0.0, 0.0, 0.0, None]],
        [[3, 0.75, 0, 0, 0, 0, 2.5]],
    ]
    links = {"parameter_set": 1, "resumes": 2, "retry_of": 2, "paused_at": 2}
    found = record_of(STUDY, trial(TrialState.PRUNED, curve=curve, **links))
    assert found.params == {"model.optimizer.lr": 0.25}
    assert found.tags == {"trial": "3", "kind": "trial", **{name: str(value) for name, value in links.items()}}
    assert found.points == {
        "f1": {1: 0.25, 2: 0.5},
        "fold_0/f1": {1: 0.25},
        "fold_0/loss": {1: 1.5},
        "fold_1/f1": {3: 0.75},
        "fold_1/loss": {3: 2.5},
    }
    assert (found.n_points, found.last_step, found.values, found.state) == (6, 3, {}, "paused")
    assert record_of(STUDY, trial(TrialState.COMPLETE)).values == {"value": 0.5}


def test_a_key_is_the_same_in_all_processes_and_that_of_no_other_trial() -> None:
    key = record_of(STUDY, trial(TrialState.RUNNING)).key
    assert key == record_of(STUDY, trial(TrialState.FAIL, worker_lost="gone")).key == "d3a43ad9d3ca476e"
    later = trial(TrialState.RUNNING)
    later.datetime_start = START.replace(microsecond=6)  # of a copied folder
    others = [later, trial(TrialState.RUNNING, number=4), trial(TrialState.RUNNING, replicate_of=1, seed=43)]
    assert len({key, *(record_of(STUDY, one).key for one in others)}) == 4


def test_trials_that_were_not_trained_have_no_run() -> None:
    assert has_run(trial(TrialState.RUNNING))
    assert not has_run(trial(TrialState.FAIL, not_trained="it was created twice"))
    assert not has_run(create_trial(state=TrialState.WAITING))


def test_new_points_come_by_ascending_steps() -> None:
    points = {"a": {2: 0.5, 1: 0.25}, "b": {1: 1.0}}
    assert list(new_points(points, {"a": {1: 0.25}}).items()) == [(1, {"b": 1.0}), (2, {"a": 0.5})]
    assert new_points(points, points) == {}
