"""What the trials of a study say of paused, resumed and failed parameter sets."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_bge.hpo.pruning.asha_trials import (
    PARAMETER_SET,
    PAUSED_AT,
    RESUMES,
    any_queued,
    ended_parameter_sets,
    latest_trials,
    not_resumable,
    parameter_set_of,
    read_halving,
    resume,
    resumed_numbers,
    standings,
)

PAUSED = {PAUSED_AT: 1}


def trials_of(*rows: tuple[TrialState, list[float], dict[str, Any]]) -> list[FrozenTrial]:
    """Trials numbered from 0: state, values at the steps from 1, user attributes."""
    found = []
    for number, (state, values, attributes) in enumerate(rows):
        trial = create_trial(
            state=state,
            value=values[-1] if state == TrialState.COMPLETE else None,
            intermediate_values=dict(enumerate(values, start=1)),
            user_attrs=attributes,
        )
        trial.number = number
        found.append(trial)
    return found


def resumed(of: int, **more: Any) -> dict[str, Any]:
    return {RESUMES: of, PARAMETER_SET: 0, **more}


def test_the_trials_of_one_parameter_set_count_as_one() -> None:
    trials = trials_of(
        (TrialState.PRUNED, [0.5], PAUSED),
        (TrialState.PRUNED, [0.7], PAUSED),
        (TrialState.PRUNED, [0.5, 0.6, 0.8], resumed(0, **{PAUSED_AT: 3})),
        (TrialState.COMPLETE, [0.5, 0.6, 0.8, 0.9], resumed(2)),
    )
    assert [parameter_set_of(trial) for trial in trials] == [0, 1, 0, 0]
    assert standings(trials, (1, 3), 1.0) == {0: {0: 0.5, 1: 0.8}, 1: {0: 0.7}}
    assert standings(trials, (1, 3), -1.0) == {0: {0: -0.5, 1: -0.8}, 1: {0: -0.7}}
    assert {number: trial.number for number, trial in latest_trials(trials).items()} == {0: 3, 1: 1}
    assert resumed_numbers(trials) == {0, 2}
    assert ended_parameter_sets(trials) == 2
    assert not_resumable(trials) == {0}


@pytest.mark.parametrize(
    ("state", "attributes", "can"),
    [
        (TrialState.PRUNED, PAUSED, True),
        (TrialState.PRUNED, {}, False),  # out of memory, or NaN
        (TrialState.RUNNING, {}, False),
        (TrialState.WAITING, {}, False),
        (TrialState.COMPLETE, {}, False),
    ],
)
def test_only_a_paused_parameter_set_can_be_resumed(state: TrialState, attributes: dict[str, Any], can: bool) -> None:
    trials = trials_of((state, [0.5], attributes))
    assert (not_resumable(trials) == set()) is can
    assert read_halving(trials, (1,), 1, 1.0).next_resumed() == (0 if can else None)


def test_a_parameter_set_that_fails_three_times_after_it_was_resumed_is_given_up() -> None:
    failed = (TrialState.FAIL, [0.5], resumed(0, swept="process 1 is gone"))
    interrupted = (TrialState.FAIL, [0.5], resumed(0, swept="interrupted: SystemExit"))
    paused = (TrialState.PRUNED, [0.5], PAUSED)
    assert not_resumable(trials_of(paused, failed, failed, interrupted)) == set()
    assert not_resumable(trials_of(paused, failed, failed, failed)) == {0}


def test_a_parameter_set_can_be_left_out_of_the_state() -> None:
    trials = trials_of((TrialState.PRUNED, [0.5], PAUSED), (TrialState.PRUNED, [0.7], PAUSED))
    assert read_halving(trials, (1,), 2, 1.0).next_resumed() == 1
    assert read_halving(trials, (1,), 1, 1.0, without=1).next_resumed() == 0
    assert len(read_halving(trials, (1,), 1, 1.0, without=1).ranking[0]) == 1


def test_a_resumed_trial_has_the_parameters_and_the_number_of_the_paused_one() -> None:
    study = optuna.create_study()
    trial = study.ask()
    value = trial.suggest_float("x", 0.0, 1.0)
    trial.set_user_attr(PAUSED_AT, 4)
    study.tell(trial, state=TrialState.PRUNED)
    resume(study, study.trials[0], (1, 4, 16))
    assert any_queued(study.trials)
    other = study.ask()
    assert other.suggest_float("x", 0.0, 1.0) == value
    assert other.user_attrs == {RESUMES: 0, PARAMETER_SET: 0, "settled_rungs": 2}
    assert not any_queued(study.trials)
