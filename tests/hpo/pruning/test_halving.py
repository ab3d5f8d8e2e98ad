"""The rules of asynchronous successive halving, against slow plain versions and against a real study."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.asha import AshaPruner
from lightning_bge.hpo.pruning.halving import Halving, rung_steps
from lightning_bge.hpo.space.draw import SamplerConfig
from tests.helpers.curve_objective import SPACE, CurveObjective, Decision
from tests.helpers.study_run import run_study

optuna.logging.set_verbosity(optuna.logging.WARNING)
Standings = Mapping[int, Mapping[int, float]]  # parameter set -> rung -> value there, higher is better


def state_of(standings: Standings, n_rungs: int, factor: int, running: frozenset[int] = frozenset()) -> Halving:
    halving = Halving(n_rungs, factor)
    for number, values in standings.items():
        for rung, value in values.items():
            halving.add(number, rung, value, paused=rung == max(values) and number not in running)
    return halving


def plain_ranking(standings: Standings, rung: int) -> list[int]:
    there = [number for number, values in standings.items() if rung in values]
    return sorted(there, key=lambda number: (-standings[number][rung], number))


def plain_next(standings: Standings, n_rungs: int, factor: int, running: set[int]) -> int | None:
    """Which paused one is resumed next, sorted anew for each decision."""
    for rung in reversed(range(n_rungs)):
        ranking = plain_ranking(standings, rung)
        for number in ranking[: len(ranking) // factor]:
            if max(standings[number]) == rung and number not in running:
                return number
    return None


def test_rungs_are_powers_of_the_factor_below_the_last_step() -> None:
    assert rung_steps(18, 1, 4) == (1, 4, 16)
    assert rung_steps(16, 1, 4) == (1, 4)
    assert rung_steps(10, 3, 2) == (3, 6)
    assert rung_steps(3, 3, 4) == ()


def test_the_best_paused_one_of_the_highest_rung_is_resumed_when_it_is_in_the_top_share() -> None:
    there = {0: {0: 0.5}, 1: {0: 0.9}, 2: {0: 0.1}}
    assert state_of(there, 2, 4).next_resumed() is None  # three, of which a quarter is none
    there[3] = {0: 0.2}
    assert state_of(there, 2, 4).next_resumed() == 1
    assert state_of(there, 2, 4, frozenset({1})).next_resumed() is None  # it is running
    there[1][1] = 0.95
    assert state_of(there, 2, 4).next_resumed() is None  # the top quarter was resumed
    there |= {4: {0: 0.91}, 5: {0: 0.3}, 6: {0: 0.3}, 7: {0: 0.3}}
    assert state_of(there, 2, 4).next_resumed() == 4  # a late one that is above an earlier one that was resumed
    # the higher rung first
    assert state_of({0: {0: 1.0, 1: 0.5}, 1: {0: 0.9, 1: 0.4}}, 2, 2).next_resumed() == 0


def test_the_best_paused_one_is_resumed_where_nothing_else_is_left_and_none_is_complete() -> None:
    halving = state_of({0: {0: 0.5}, 1: {0: 0.9}, 2: {0: 0.1}}, 2, 4)
    assert halving.next_resumed() is None
    assert halving.next_resumed(nothing_else=True) == 1
    halving.add(2, 1, 0.0, paused=True)
    assert halving.next_resumed(nothing_else=True) == 2  # the higher rung
    halving.complete()
    assert halving.next_resumed(nothing_else=True) is None


def test_what_can_never_be_resumed() -> None:
    there: dict[int, dict[int, float]] = {number: {0: -float(number)} for number in range(8)}
    # of 16 at most 4 are resumed from the first rung
    assert state_of(there, 2, 4).resumable(16) == [0, 1, 2, 3]
    assert state_of(there, 2, 4).resumable(64) == list(range(8))
    there[0][1] = there[1][1] = 0.0
    assert state_of(there, 2, 4).resumable(16) == [0, 1, 2, 3]
    assert state_of(there, 2, 4).resumable(4) == [0]  # of four on the second rung one: of equal ones the earlier
    # with fewer than the factor none is ever in the top share: only the best one, while none is complete
    few = state_of({0: {0: 0.1}, 1: {0: 0.3}, 2: {0: 0.2}}, 1, 4)
    assert few.resumable(3) == [1]
    few.complete()
    assert few.resumable(3) == []


def test_a_copy_is_independent() -> None:
    halving = state_of({0: {0: 0.5}, 1: {0: 0.9}}, 1, 2)
    other = halving.copy()
    assert other.resume(1) == 0
    other.add(2, 0, 1.0, paused=True)
    assert halving.next_resumed() == 1
    assert len(halving.ranking[0]) == 2


@pytest.mark.parametrize("seed", range(5))
def test_each_decision_equals_a_plain_version(seed: int) -> None:
    draw = random.Random(seed)
    halving, there, running = Halving(3, 3), {}, set()
    resumed = 0
    for number in range(120):
        there[number] = {0: float(draw.randrange(20))}  # with ties
        halving.add(number, 0, there[number][0], paused=True)
        while (found := halving.next_resumed()) is not None:
            assert found == plain_next(there, 3, 3, running)
            rung = halving.resume(found) + 1
            resumed += 1
            if rung == 3:
                running.add(found)
                continue
            there[found][rung] = float(draw.randrange(20))
            halving.add(found, rung, there[found][rung], paused=True)
        assert plain_next(there, 3, 3, running) is None
        gone = {
            other
            for at in range(3)
            for other in plain_ranking(there, at)[120 // 3 :]
            if max(there[other]) == at and other not in running
        }
        best = max((n for n in there if n not in running), key=lambda n: (max(there[n]), there[n][max(there[n])], -n))
        assert set(halving.resumable(120)) == set(there) - running - (gone - {best})
    assert resumed > 40


def machine_decisions(curves: list[list[float]], steps: tuple[int, ...], factor: int) -> list[Decision]:
    """Drive the state machine alone, on one worker."""
    halving, found, started = Halving(len(steps), factor), [], 0
    while True:
        number = halving.next_resumed(nothing_else=started == len(curves))
        if number is None and started == len(curves):
            return found
        if number is None:
            number, rung, started = started, 0, started + 1
            found.append(("start", number, 0))
        else:
            rung = halving.resume(number) + 1
            found.append(("resume", number, rung - 1))
        while rung < len(steps):
            pauses = halving.arrive(number, rung, curves[number][steps[rung] - 1])
            found.append(("pause" if pauses else "train on", number, rung))
            if pauses:
                break
            rung += 1
        else:
            halving.complete()
            found.append(("complete", number, len(steps)))


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize("seed", range(3))
def test_a_real_study_decides_as_the_state_machine_does(tmp_path: Path, seed: int, direction: str) -> None:
    draw, steps, factor = random.Random(seed), (1, 3), 3
    # coarse values, so that some are equal
    curves = [[round(draw.random() + 0.1 * step, 1) for step in range(9)] for _ in range(40)]
    study = optuna.create_study(direction=direction, pruner=AshaPruner(steps, factor), study_name="s")
    objective = CurveObjective(curves, 1.0 if direction == "maximize" else -1.0)
    run_study(study, objective, StudyConfig(40, SPACE, sampler=SamplerConfig("random")), tmp_path)
    assert objective.decisions == machine_decisions(curves, steps, factor)
    assert {kind for kind, _, _ in objective.decisions} == {"start", "pause", "train on", "resume", "complete"}
    assert sum(trial.state == TrialState.COMPLETE for trial in study.trials) > 1
