"""A search run forward is the search that is run."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_bge.hpo.forecast.preview import sample_curves
from lightning_bge.hpo.forecast.replay import replay_asha
from lightning_bge.hpo.forecast.simulator import Halving, Outcome, Prices, Promoted, Running, schedule, simulate_asha
from lightning_bge.hpo.pruning.asha import next_resumed, rung_steps
from lightning_bge.hpo.steps import Steps

STEPS = Steps(3, 6)
RUNGS = rung_steps(STEPS.total, 1, 4)


def free(points: int, reports: int = STEPS.total, rungs: int = len(RUNGS), **changes: float) -> Prices:
    """One second a report, and nothing else costs anything, but for the changes."""
    parts = {"begin": (points,), "reports": (points, reports), "pause": (points, rungs), "resume": (points, rungs)}
    return Prices(**{name: np.full(size, changes.get(name, float(name == "reports"))) for name, size in parts.items()})


def values(points: int, seed: int) -> np.ndarray:
    return np.array([curve.values for curve in sample_curves(points, STEPS, seed).trials])


@pytest.mark.parametrize("points", [1, 3, 12, 70])
@pytest.mark.parametrize("seed", range(3))
def test_one_worker_runs_what_the_replay_runs(points: int, seed: int) -> None:
    found = simulate_asha(RUNGS, 4, points, values(points, seed), free(points), workers=1)
    expected = replay_asha(sample_curves(points, STEPS, seed), RUNGS, 4, range(points))
    assert found.reports == expected.reports
    assert found.seconds == found.wall == expected.seconds


def test_sorted_standings_say_what_the_others_say() -> None:
    random = np.random.default_rng(0)
    halving, there, over = Halving(2, 3, 99), {}, set()
    for point in range(80):
        value = float(random.integers(20))  # ties
        there[point] = {0: value}
        halving.arrive(point, 0, value)
        while (found := halving.next()) is not None:
            assert found[0] == next_resumed(there, 2, 3, over)
            halving.go_on(found[1])
            if found[1] == 1:
                over.add(found[0])
                continue
            value = float(random.integers(20))
            there[found[0]][1] = value
            halving.arrive(found[0], 1, value)
        assert next_resumed(there, 2, 3, over) is None
    assert over


def test_each_part_is_paid_for_once() -> None:
    # worse and worse: 4 points, of which the first is resumed when all four stand at the rung, and runs to its end
    falling = np.array([[4.0, 4.0], [3.0, 3.0], [2.0, 2.0], [1.0, 1.0]])
    prices = free(4, reports=2, rungs=1, begin=10.0, pause=100.0, resume=1000.0)
    found = simulate_asha([1], 4, 4, falling, prices, workers=1)
    # five visits and five reports; only the first one may ever be resumed, so that only its checkpoint is written
    assert found == Outcome((2, 1, 1, 1), (2, 1, 1, 1), 5 * 10 + 5 + 100 + 1000, 5 * 10 + 5 + 100 + 1000)


def test_a_point_that_would_be_the_next_one_does_not_pause() -> None:
    rising = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]])
    found = simulate_asha([1], 4, 4, rising, free(4, reports=2, rungs=1, pause=100.0, resume=1000.0), workers=1)
    assert found.reports == (1, 1, 1, 2)
    assert found.visits == (1, 1, 1, 1)
    # each stood first when it came, and could have been resumed
    assert found.seconds == 5 + 3 * 100


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_several_workers_share_the_work_and_may_begin_some_more(workers: int) -> None:
    count = 60 + workers
    alone = simulate_asha(RUNGS, 4, 60, values(count, 0), free(count), 1)
    found = simulate_asha(RUNGS, 4, 60, values(count, 0), free(count), workers)
    begun = sum(visits > 0 for visits in found.visits)
    assert 60 <= begun < 60 + workers
    assert found.seconds == sum(found.reports)
    assert found.seconds / workers <= found.wall < alone.wall
    assert max(found.reports) == STEPS.total


def test_what_is_running_is_not_begun_again() -> None:
    halving = Halving(1, 2, 2)
    halving.arrive(0, 0, 1.0)
    rest = Promoted(halving, (1,), 3, ended=1, begun=2, running=[Running(5.0, 1, 0, True)])
    found = rest.run(lambda point, rung: 0.0, free(3, reports=3, rungs=1), workers=1)
    # point 1 reaches the rung at 5; then 0 is in the top half, and makes its two further reports
    assert (found.reports, found.visits, found.wall) == ((3, 1, 0), (1, 0, 0), 7.0)


def test_jobs_go_to_the_first_free_worker() -> None:
    assert schedule([3.0, 1.0, 1.0, 2.0], 2) == 4.0
    assert schedule([3.0, 1.0, 1.0, 2.0], 1) == 7.0
    assert schedule([], 2) == 0.0
