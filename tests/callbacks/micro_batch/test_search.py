"""Which sizes are tried and which one is taken, on simulated machines."""

from __future__ import annotations

import math
import random

import pytest

from lightning_bge.callbacks.micro_batch.search import Answer, FreeMemory, Search, TrialStep
from tests.helpers.trial_steps import HELD, ROW


class Machine:
    """Steps that take `HELD + ROW * units` bytes, of which a limit that raises sees `factor` times as many."""

    def __init__(self, free: FreeMemory, factor: float = 1.0, constant: float = 0.0, noise: float = 0.0) -> None:
        self.free, self.factor, self.constant, self.noise = free, factor, constant, noise
        self.random = random.Random(0)
        self.tried: list[int] = []

    def bytes(self, units: float) -> float:
        return HELD + ROW * units

    def __call__(self, units: int, validate: bool) -> TrialStep | None:
        self.tried.append(units)
        assert self.free.killing is None or self.bytes(units) <= self.free.killing, f"{units} units: killed"
        if self.free.raising is not None and self.bytes(units) * self.factor > self.free.raising:
            return None
        peak = self.bytes(units) + self.random.uniform(-self.noise, self.noise)
        return TrialStep(units, round(peak), (self.constant + 0.1 * units) / 1000)

    def search(self, margin: float = 0.1, min_speedup: float | None = None, enough: int = 16) -> tuple[Answer, Search]:
        search = Search(self, lambda: self.free, margin, min_speedup, enough, step=4, noise=round(2 * self.noise))
        return search.run(), search


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.0, 1.1, 1.7, 3.0])
@pytest.mark.parametrize("free", [1_000, 7_777, 123_456, 10_000_000])
def test_what_raises_is_tried_up_to_the_limit_and_the_margin_is_left(free: int, factor: float) -> None:
    machine = Machine(FreeMemory(free, None), factor)
    answer, search = machine.search()
    most = (free / factor - HELD) / ROW
    assert answer.units <= 0.9 * most + 1
    if most > 20:
        assert answer.units >= 0.9 * most / 1.05 - 1
        assert machine.bytes(1.35 * answer.units) * factor > free
    assert answer.units in [units for units, peak, _ in search.tried if peak is not None]
    assert len(machine.tried) <= 6 + math.log(most + 2, 8) + (12 if factor != 1 else 0)
    assert "are left free" in answer.reason


@pytest.mark.parametrize(("noise", "free"), [(0, 900), (9, 900), (0, 7_777), (50, 7_777), (HELD, 10**5), (HELD, 10**7)])
def test_beyond_a_limit_that_kills_nothing_is_tried(free: int, noise: float) -> None:
    machine = Machine(FreeMemory(None, free), noise=noise)
    answer, search = machine.search()
    most = (free - HELD) / ROW
    assert max(machine.tried) <= 0.95 * most  # and `Machine` makes sure of it
    assert 0.8 * most - 1 <= answer.units <= 0.92 * most
    assert search.peak(answer.units) <= free
    assert answer.reason == "as much as the limit is predicted to allow, less 10% of the activations"


def test_of_two_limits_the_tighter_one_counts() -> None:
    assert Machine(FreeMemory(10_000, 5_000)).search()[0].units == pytest.approx(0.9 * 470, rel=0.01)
    assert Machine(FreeMemory(5_000, 10_000)).search()[0].units == pytest.approx(0.9 * 470, rel=0.05)


@pytest.mark.parametrize(("free", "units"), [(305, 0), (315, 1), (321, 2), (400, 10)])
def test_little_memory(free: int, units: int) -> None:
    assert Machine(FreeMemory(free, None)).search(margin=0.0)[0].units == units
    reason = Machine(FreeMemory(free, None)).search(margin=0.5, min_speedup=0.05)[0].reason
    assert reason == "not even 4 fits" if units == 0 else "fitted" in reason


def test_one_unit_may_be_beyond_a_limit_that_kills() -> None:
    machine = Machine(FreeMemory(None, 299))
    machine.bytes = lambda units: 250.0  # type: ignore[method-assign]
    assert machine.search()[0].units >= 1
    search = Search(lambda units, _: TrialStep(units, 400, 1.0), lambda: FreeMemory(None, 300), 0.1, None, 1)
    assert search.run() == Answer(0, "not even 1 fits")


def test_room_that_steps_take_away_is_counted() -> None:
    """As by a library that keeps something for each shape it has seen."""
    left = [10_000]

    def attempt(units: int, validate: bool) -> TrialStep:
        peak = HELD + ROW * units
        assert peak <= left[0]
        left[0] -= 100
        return TrialStep(units, peak, 1.0)

    answer = Search(attempt, lambda: FreeMemory(None, left[0]), 0.1, None, 1).run()
    assert 0.75 * (left[0] - HELD) / ROW <= answer.units <= 0.9 * (left[0] + 100 - HELD) / ROW


def gain(units: int, constant: float) -> float:
    return 2 * (constant + 0.1 * units / 2) / (constant + 0.1 * units) - 1


@pytest.mark.parametrize("constant", [0.0, 0.5, 3.0, 20.0])
@pytest.mark.parametrize("free", [FreeMemory(None, None), FreeMemory(10**7, None), FreeMemory(None, 10**7)])
def test_growth_ends_where_speed_does(free: FreeMemory, constant: float) -> None:
    machine = Machine(free, constant=constant)
    answer, _ = machine.search(min_speedup=0.05)
    if answer.units > 16:
        assert gain(answer.units, constant) >= 0.05
    assert gain(2 * answer.units, constant) < 0.05 or gain(answer.units, constant) < 0.05
    assert answer.reason.endswith("units a second over half of it")
    assert machine.tried[:3] == [1, 2, 8]  # half of enough is the first that is timed
    assert all(machine.tried.count(units) == 2 for units in machine.tried[3:])


def test_memory_may_end_growth_before_speed_does() -> None:
    for free in (FreeMemory(1_500, None), FreeMemory(None, 1_500)):
        machine = Machine(free, constant=100.0)
        answer, _ = machine.search(min_speedup=0.05)
        assert answer.units == pytest.approx(0.9 * 120, rel=0.05)
    tiny = Machine(FreeMemory(400, None), constant=100.0).search(min_speedup=0.05)[0]
    assert tiny.units == 9  # less than enough


def test_a_size_that_fits_only_once_is_given_up() -> None:
    machine = Machine(FreeMemory(10**7, None), constant=100.0)

    def moody(units: int, validate: bool) -> TrialStep | None:
        return None if units > 30 and not validate else machine(units, validate)

    answer = Search(moody, lambda: machine.free, 0.1, 0.05, 16).run()
    assert 16 <= answer.units < 32


def test_better_of_two_steps_is_timed() -> None:
    """The first step of a size is slow where something is compiled for it."""
    seen: set[int] = set()

    def attempt(units: int, validate: bool) -> TrialStep:
        first = units not in seen
        seen.add(units)
        return TrialStep(units, 100, scale * (1.0 + 0.1 * units + 1000 * first))

    scale = 1e-4
    assert Search(attempt, lambda: FreeMemory(None, None), 0.1, 0.05, 16).run().units == 128
    seen.clear()
    scale = 1.0  # a long step is made once
    assert Search(attempt, lambda: FreeMemory(None, None), 0.1, 0.05, 16).run().units > 128


def test_where_there_is_plenty_memory_is_not_looked_at() -> None:
    for free in (FreeMemory(10**4, None), FreeMemory(None, 10**4), FreeMemory(10**9, 10**4)):
        machine = Machine(free)
        assert Search(machine, lambda free=free: free, 0.1, 0.05, 16).run_if_plenty() is not None
        assert machine.tried == [1, 2, 8, 8, 16, 16]
        machine = Machine(free, constant=1000.0)  # more and more would pay
        assert Search(machine, lambda free=free: free, 0.1, 0.05, 16).run_if_plenty() is None
        assert machine.bytes(max(machine.tried)) <= 0.5 * 10**4
        assert Search(machine, lambda free=free: free, 0.1, None, 16).run_if_plenty() is None
    assert Search(Machine(FreeMemory(305, None)), lambda: FreeMemory(305, None), 0.1, 0.05, 16).run_if_plenty() is None
