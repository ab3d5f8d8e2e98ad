"""What trials took, by hand."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_bge.hpo.forecast.trial_times import TrialTimes, refit_epochs
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.trials import REPORTS_BEFORE, RESUMES

START = datetime(2026, 1, 1)
STEPS = Steps(2, 2)


def ended(number: int, start: float, seconds: float, steps: int, worker: str = "a", **attributes: Any) -> FrozenTrial:
    """A trial of some steps, each with 2 s of training and 1 s of validation."""
    curve = [[[step, 0.5, 2.0, 1.0, 0.0, 0.0] for step in range(1, steps + 1)]]
    trial = create_trial(
        state=TrialState.COMPLETE if steps == STEPS.total else TrialState.PRUNED,
        value=0.5,
        intermediate_values=dict.fromkeys(range(1, steps + 1), 0.5),
        user_attrs={"curve": curve, "worker": {"id": worker, "host": "h", "pid": 1}, **attributes},
    )
    trial.number = number
    trial.datetime_start = START + timedelta(seconds=start)
    trial.datetime_complete = trial.datetime_start + timedelta(seconds=seconds)
    return trial


def test_a_resumed_trial_counts_its_own_steps_alone() -> None:
    resumed = {RESUMES: 0, REPORTS_BEFORE: 1}
    times = TrialTimes.read([ended(0, 0, 5, 1), ended(1, 6, 11, 4, **resumed)], STEPS)
    assert times is not None
    first, second = times.trials[0], times.trials[1]
    assert (first.start, first.steps, first.inside, first.train, first.seconds) == (0, 1, 3.0, 2.0, 5.0)
    assert (second.start, second.steps, second.end, second.inside, second.train) == (1, 3, 4, 9.0, 6.0)
    assert times.gap == 1.0


def test_a_resumed_trial_whose_checkpoint_was_gone_counts_all_its_steps() -> None:
    times = TrialTimes.read([ended(0, 0, 5, 1), ended(1, 6, 14, 4, **{RESUMES: 0, REPORTS_BEFORE: 0})], STEPS)
    assert times is not None
    again = times.trials[1]
    assert (again.start, again.steps, again.inside, again.train) == (0, 4, 12.0, 8.0)


def test_seconds_of_a_trial_come_from_like_ones_first() -> None:
    times = TrialTimes.read([ended(0, 0, 14, 4), ended(1, 14, 5, 1, worker="b")], STEPS)
    assert times is not None
    # 3 s a step and 2 s outside of the steps, in all of them
    assert times.seconds(0, 4) == pytest.approx(14)
    assert times.seconds(1, 3) == pytest.approx(8)
    assert times.ratios == pytest.approx({0: 1.0, 1: 1.0})
    # two folds: twice the rows of a fold's training part, 2 s an epoch without a validation
    assert refit_epochs(2) == pytest.approx(1.6)
    assert times.refit_seconds(STEPS) == pytest.approx(2.0 * 2 * 1.6)


def test_the_first_of_several_trials_of_a_process_is_left_out() -> None:
    trials = [ended(0, 0, 100, 4), ended(1, 100, 14, 4), ended(2, 114, 14, 4)]
    times = TrialTimes.read(trials, STEPS)
    assert times is not None
    assert set(times.trials) == {1, 2}
    assert times.seconds(0, 4) == pytest.approx(14)


def test_nothing_is_known_before_a_trial_has_ended() -> None:
    running = create_trial(state=TrialState.RUNNING)
    assert TrialTimes.read([running], STEPS) is None


def test_a_single_trial_leaves_the_rest_uncertain() -> None:
    one = TrialTimes.read([ended(0, 0, 14, 4)], STEPS)
    many = TrialTimes.read([ended(number, 20 * number, 14, 4, worker=str(number)) for number in range(30)], STEPS)
    assert one is not None
    assert many is not None
    spread = [np.std([times.factor(np.random.default_rng(seed)) for seed in range(200)]) for times in (one, many)]
    assert spread[0] > 5 * spread[1]
