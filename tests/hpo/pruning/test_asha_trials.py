"""What the trials of a study say of paused, resumed and failed parameter sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_bge.hpo.pruning.asha_trials import AshaTrials
from lightning_bge.hpo.trials import (
    ERROR,
    INTERRUPTED,
    PARAMETER_SET,
    PAUSED_AT,
    RESUMES,
    WORKER_LOST,
    ended_parameter_sets,
    latest_trials,
    parameter_set_of,
    resumed_numbers,
)

PAUSED = {PAUSED_AT: 1}


def read(
    trials: Sequence[FrozenTrial], steps: Sequence[int] = (1,), sign: float = 1.0, reduction_factor: int = 1
) -> AshaTrials:
    found = AshaTrials(steps, reduction_factor, sign)
    found.add(trials)
    return found


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
    assert read(trials, (1, 3), 1.0).standings == {0: {0: 0.5, 1: 0.8}, 1: {0: 0.7}}
    assert read(trials, (1, 3), -1.0).standings == {0: {0: -0.5, 1: -0.8}, 1: {0: -0.7}}
    assert {number: trial.number for number, trial in latest_trials(trials).items()} == {0: 3, 1: 1}
    assert resumed_numbers(trials) == {0, 2}
    assert ended_parameter_sets(trials) == 2
    assert read(trials).paused == {1}


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
    assert read(trials).paused == ({0} if can else set())
    assert read(trials, (1,), reduction_factor=1).halving.next_resumed() == (0 if can else None)


@pytest.mark.parametrize(
    "why",
    [{WORKER_LOST: "process 1 is gone"}, {INTERRUPTED: "SIGTERM"}, {WORKER_LOST: "process 1 is gone", ERROR: "3"}],
)
def test_a_parameter_set_that_failed_after_it_was_resumed_is_not_resumed_but_keeps_its_place(
    why: dict[str, str],
) -> None:
    paused, failed = (TrialState.PRUNED, [0.5], PAUSED), (TrialState.FAIL, [0.5, 0.9], resumed(0, **why))
    trials = trials_of(paused, failed)
    assert read(trials).paused == set()
    assert read(trials, (1, 2), 1.0).standings == {0: {0: 0.5}}
    again = trials_of(paused, failed, (TrialState.PRUNED, [0.5, 0.6], resumed(0, **{PAUSED_AT: 2})))
    assert read(again).paused == {0}
    assert read(again, (1, 2), reduction_factor=1).halving.next_resumed() == 0


def test_a_parameter_set_can_be_left_out_of_the_state() -> None:
    trials = trials_of((TrialState.PRUNED, [0.5], PAUSED), (TrialState.PRUNED, [0.7], PAUSED))
    assert read(trials, (1,), reduction_factor=2).halving.next_resumed() == 1
    assert read(trials).without(1).next_resumed() == 0
    assert len(read(trials).without(1).ranking[0]) == 1
