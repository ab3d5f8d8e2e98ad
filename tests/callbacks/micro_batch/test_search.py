"""Which sizes are tried and which one is taken, on simulated machines."""

from __future__ import annotations

import math
import random

import pytest

from lightning_bge.callbacks.micro_batch.search import Answer, Search, TrialStep
from tests.helpers.trial_steps import HELD, ROW


class Machine:
    """Steps that take `HELD + ROW * units` bytes and fail beyond `raising`; beyond `killing` the test fails."""

    def __init__(
        self, raising: float = math.inf, killing: int | None = None, *, constant: float = 0.0, noise: float = 0.0
    ) -> None:
        self.raising, self.killing, self.constant, self.noise = raising, killing, constant, noise
        self.random = random.Random(0)
        self.tried: list[int] = []

    def bytes(self, units: float) -> float:
        return HELD + ROW * units

    def __call__(self, units: int, validate: bool) -> TrialStep | None:
        self.tried.append(units)
        assert self.killing is None or self.bytes(units) <= self.killing, f"{units} units: killed"
        if self.bytes(units) > self.raising:
            return None
        peak = self.bytes(units) + self.random.uniform(-self.noise, self.noise)
        return TrialStep(units, round(peak), (self.constant + 0.1 * units) / 1000)

    def search(self, margin: float = 0.1, min_speedup: float | None = None, default: int = 16) -> Answer:
        options = {"step": 4, "noise": round(2 * self.noise)}
        return Search(
            self, lambda: self.killing, margin=margin, min_speedup=min_speedup, default=default, **options
        ).run()


@pytest.mark.parametrize("default", [1, 16, 8192])
@pytest.mark.parametrize("free", [1_000, 7_777, 123_456, 10_000_000])
def test_what_raises_is_tried_up_to_the_limit_and_the_margin_is_left(free: int, default: int) -> None:
    machine = Machine(free)
    answer = machine.search(default=default)
    most = (free - HELD) / ROW
    assert 0.9 * most / 1.05 - 1 <= answer.units <= 0.9 * most
    assert answer.peak == pytest.approx(machine.bytes(answer.units), abs=1)
    assert len(machine.tried) <= 8 + math.log2(most)
    assert "are left free" in answer.reason


@pytest.mark.parametrize(("noise", "free"), [(0, 900), (9, 900), (0, 7_777), (50, 7_777), (HELD, 10**5), (HELD, 10**7)])
def test_beyond_a_limit_that_kills_nothing_is_tried(free: int, noise: float) -> None:
    machine = Machine(killing=free, noise=noise)
    answer = machine.search()
    most = (free - HELD) / ROW
    assert max(machine.tried) <= 0.95 * most  # and `Machine` makes sure of it
    assert 0.8 * most - 1 <= answer.units <= 0.92 * most
    assert answer.peak <= free
    assert answer.reason == "as much as the limit is predicted to allow, less 10% of the activations"


def test_of_two_limits_the_tighter_one_counts() -> None:
    assert Machine(10_000, 5_000).search().units == pytest.approx(0.9 * 470, rel=0.05)
    assert Machine(5_000, 10_000).search().units == pytest.approx(0.9 * 470, rel=0.05)


@pytest.mark.parametrize(("free", "units"), [(305, 0), (315, 1), (321, 2), (400, 10)])
def test_little_memory(free: int, units: int) -> None:
    assert Machine(free).search(margin=0.0).units == units
    reason = Machine(free).search(margin=0.5, min_speedup=0.05).reason
    assert reason == "not even 4 fits" if units == 0 else "fitted" in reason


def test_one_unit_may_be_beyond_a_limit_that_kills() -> None:
    search = Search(lambda units, _: TrialStep(units, 400, 1.0), lambda: 300, margin=0.1, min_speedup=None, default=1)
    assert search.run() == Answer(0, "not even 1 fits")


def test_room_that_steps_take_away_is_counted() -> None:
    """As by a library that keeps something for each shape it has seen."""
    left = [10_000]

    def attempt(units: int, validate: bool) -> TrialStep:
        peak = HELD + ROW * units
        assert peak <= left[0]
        left[0] -= 100
        return TrialStep(units, peak, 1.0)

    answer = Search(attempt, lambda: left[0], margin=0.1, min_speedup=None, default=1).run()
    assert 0.75 * (left[0] - HELD) / ROW <= answer.units <= 0.9 * (left[0] + 200 - HELD) / ROW


def test_what_a_step_leaves_behind_is_a_part_of_its_peak() -> None:
    """As where the C library keeps what the step has used: it fitted, although no other would fit beside it."""
    left = [2_000]

    def attempt(units: int, validate: bool) -> TrialStep:
        peak = HELD + ROW * units
        left[0] = 2_000 - peak
        return TrialStep(units, peak, 1.0)

    answer = Search(attempt, lambda: left[0], margin=0.1, min_speedup=None, default=8).run()
    assert answer.units >= 64
    assert answer.reason.startswith("as much as the limit is predicted to allow")


def gain(units: int, constant: float) -> float:
    return 2 * (constant + 0.1 * units / 2) / (constant + 0.1 * units) - 1


@pytest.mark.parametrize("constant", [0.0, 0.5, 3.0, 20.0])
@pytest.mark.parametrize("limits", [(math.inf, None), (10**7, None), (math.inf, 10**7)])
def test_growth_ends_where_speed_does(limits: tuple[float, int | None], constant: float) -> None:
    machine = Machine(*limits, constant=constant)
    answer = machine.search(min_speedup=0.05)
    if answer.units > 16:
        assert gain(answer.units, constant) >= 0.05
    assert gain(2 * answer.units, constant) < 0.05
    assert answer.reason.endswith("units a second over half of it")
    assert machine.tried[:3] == [1, 2, 16]  # the default is the first that is timed
    most = max(machine.tried)  # it and half of it are made 3 more times before the search ends
    assert all(machine.tried.count(units) == (5 if units >= most // 2 else 2) for units in machine.tried[2:])


@pytest.mark.parametrize("limits", [(1_500, None), (math.inf, 1_500)])
def test_memory_may_end_growth_before_speed_does(limits: tuple[float, int | None]) -> None:
    assert Machine(*limits, constant=100.0).search(min_speedup=0.05).units == pytest.approx(0.9 * 120, rel=0.05)
    assert Machine(400, constant=100.0).search(min_speedup=0.05).units == 9  # less than the default


def test_a_large_margin_is_left_where_speed_ends_growth() -> None:
    answer = Machine(10**7).search(margin=0.8, min_speedup=0.05)
    assert answer.units == 6  # a fifth of the 32 that fitted


def test_a_size_that_fits_only_once_is_given_up() -> None:
    machine = Machine(10**7, constant=100.0)

    def attempt(units: int, validate: bool) -> TrialStep | None:
        return None if units > 30 and not validate else machine(units, validate)

    answer = Search(attempt, lambda: None, margin=0.1, min_speedup=0.05, default=16).run()
    assert 16 <= answer.units < 32


@pytest.mark.parametrize(("scale", "is_long"), [(1e-4, False), (1.0, True)])
def test_better_of_two_steps_is_timed_unless_they_are_long(scale: float, is_long: bool) -> None:
    """The first step of a size is slow where something is compiled for it."""
    seen: list[int] = []

    def attempt(units: int, validate: bool) -> TrialStep:
        seen.append(units)
        return TrialStep(units, 100, scale * (1.0 + 0.1 * units + 1000 * (seen.count(units) == 1)))

    found = Search(attempt, lambda: None, margin=0.1, min_speedup=0.05, default=16).run().units
    assert found > 128 if is_long else found == 128
    assert seen.count(16) == (1 if is_long else 2)


def test_sizes_that_never_fail_are_not_doubled_for_ever() -> None:
    answer = Search(lambda units, _: TrialStep(units, 100, 1.0), lambda: None, margin=0.1, min_speedup=None, default=1)
    assert answer.run().units == 2**30


@pytest.mark.parametrize("raises", [True, False])
def test_nothing_larger_than_what_is_of_use_is_tried(raises: bool) -> None:
    machine = Machine(10_000) if raises else Machine(killing=10_000)
    answer = Search(
        machine, lambda: machine.killing, margin=0.1, min_speedup=None, default=1, step=4, largest=100
    ).run()
    assert (answer.units, max(machine.tried)) == (100, 100)
    assert answer.reason == "nothing larger than 400 is of use"


@pytest.mark.parametrize("slow", [1, 2, 3, 4])
def test_a_machine_that_is_busy_for_a_few_steps_does_not_end_the_search(slow: int) -> None:
    machine, made = Machine(10**6, constant=50.0), 0

    def attempt(units: int, validate: bool) -> TrialStep | None:
        nonlocal made
        made += units == 64
        step = machine(units, validate)
        if step is None or units != 64 or made > slow:
            return step
        return TrialStep(step.units, step.peak, 3 * step.seconds)

    def search(steps: object) -> Answer:
        return Search(steps, lambda: None, margin=0.1, min_speedup=0.05, default=1).run()  # type: ignore[arg-type]

    assert search(attempt).units == search(Machine(10**6, constant=50.0)).units > 64


@pytest.mark.parametrize(("shortest_s", "units"), [(0.0, 1), (0.003, 32), (10.0, 100)])
def test_speed_is_not_judged_by_steps_that_are_too_short(shortest_s: float, units: int) -> None:
    machine = Machine(10_000)  # as many units a second whatever the size
    answer = Search(
        machine, lambda: None, margin=0.1, min_speedup=0.05, default=1, largest=100, shortest_s=shortest_s
    ).run()
    assert answer.units == units
