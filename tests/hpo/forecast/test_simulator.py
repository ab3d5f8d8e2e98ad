"""A simulated search takes the decisions and the seconds of the real one."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_bge.hpo.forecast.preview import sample_curves
from lightning_bge.hpo.forecast.replay import replay_asha
from lightning_bge.hpo.forecast.simulator import AshaSimulation, Durations, Outcome, Running, schedule, simulate_asha
from lightning_bge.hpo.pruning.halving import Halving, rung_steps
from lightning_bge.hpo.steps import Steps

STEPS = Steps(3, 6)
RUNGS = rung_steps(STEPS.total, 1, 4)


def durations(sets: int, steps: int = STEPS.total, rungs: int = len(RUNGS), **changes: float) -> Durations:
    """One second a step, and nothing for anything else, but for the changes."""
    shapes = {"start": (sets,), "steps": (sets, steps), "pause": (sets, rungs), "resume": (sets, rungs)}
    return Durations(
        **{name: np.full(size, changes.get(name, float(name == "steps"))) for name, size in shapes.items()}
    )


def values(sets: int, seed: int) -> np.ndarray:
    return np.array([curve.values for curve in sample_curves(sets, STEPS, seed).trials])


@pytest.mark.parametrize("sets", [1, 3, 12, 70])
@pytest.mark.parametrize("seed", range(3))
def test_one_worker_runs_what_the_replay_runs(sets: int, seed: int) -> None:
    found = simulate_asha(RUNGS, 4, sets, values(sets, seed), durations(sets), workers=1)
    expected = replay_asha(sample_curves(sets, STEPS, seed), RUNGS, 4, range(sets))
    assert found.steps == expected.steps
    assert found.seconds == found.wall == expected.seconds


def test_each_part_counts_once() -> None:
    # each worse than the one before: the first of four is resumed when all have reached the rung, and runs to its end
    falling = np.array([[4.0, 4.0], [3.0, 3.0], [2.0, 2.0], [1.0, 1.0]])
    parts = durations(4, steps=2, rungs=1, start=10.0, pause=100.0, resume=1000.0)
    found = simulate_asha([1], 4, 4, falling, parts, workers=1)
    # five trials and five steps; only the first one may ever be resumed, so that only its checkpoint is written
    assert found == Outcome((2, 1, 1, 1), (2, 1, 1, 1), 5 * 10 + 5 + 100 + 1000, 5 * 10 + 5 + 100 + 1000)


def test_a_parameter_set_that_would_be_resumed_next_does_not_pause() -> None:
    rising = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]])
    found = simulate_asha([1], 4, 4, rising, durations(4, steps=2, rungs=1, pause=100.0, resume=1000.0), workers=1)
    assert found.steps == (1, 1, 1, 2)
    assert found.trials == (1, 1, 1, 1)
    # each stood first when it came, and could have been resumed
    assert found.seconds == 5 + 3 * 100


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_several_workers_share_the_work_and_may_start_some_more(workers: int) -> None:
    count = 60 + workers
    alone = simulate_asha(RUNGS, 4, 60, values(count, 0), durations(count), 1)
    found = simulate_asha(RUNGS, 4, 60, values(count, 0), durations(count), workers)
    started = sum(trials > 0 for trials in found.trials)
    assert 60 <= started < 60 + workers
    assert found.seconds == sum(found.steps)
    assert found.seconds / workers <= found.wall < alone.wall
    assert max(found.steps) == STEPS.total


def test_what_is_running_is_not_started_a_second_time() -> None:
    halving = Halving(1, 2)
    assert halving.arrive(0, 0, 1.0)
    rest = AshaSimulation(
        halving,
        n_trials=2,
        rungs=(1,),
        durations=durations(3, steps=3, rungs=1),
        value=lambda parameter_set, rung: 0.0,
        ended=1,
        started=2,
        running=[Running(5.0, 1, 0, True)],
    )
    found = rest.run(workers=1)
    # parameter set 1 reaches the rung at 5 s; then 0 is in the top half, and makes its two further steps
    assert (found.steps, found.trials, found.wall) == ((3, 1, 0), (1, 0, 0), 7.0)


def test_jobs_go_to_the_first_free_worker() -> None:
    assert schedule([3.0, 1.0, 1.0, 2.0], 2) == 4.0
    assert schedule([3.0, 1.0, 1.0, 2.0], 1) == 7.0
    assert schedule([], 2) == 0.0
