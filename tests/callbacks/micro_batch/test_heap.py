"""Whether the tensors of a step come from the C library's heap, where address space is limited."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_bge.callbacks.micro_batch import cache as cache_module
from lightning_bge.callbacks.micro_batch import finder as finder_module
from lightning_bge.callbacks.micro_batch import heap
from lightning_bge.callbacks.micro_batch.search import Answer, Search, TrialStep
from lightning_bge.runtime.memory import LARGEST_HEAP, SMALLEST_HEAP
from tests.helpers.trial_steps import Use, search

ROW, HELD = 10, 100  # bytes of a step: of a unit, and those that each step takes
FREE = 10_000  # of which 9,000 may be used with the margin


class Machine:
    """Steps whose tensors have pages of their own at first: `slower` times as long as on the heap.

    Args:
        slower: how much.
        growth: how many times as much memory a step takes on the heap.
        constant: seconds of each step.
    """

    def __init__(self, slower: float = 1.5, growth: float = 1.5, constant: float = 0.0) -> None:
        self.slower, self.growth, self.constant = slower, growth, constant
        self.largest = SMALLEST_HEAP
        self.tried: list[int] = []
        self.used = 0

    def limit_malloc(self, largest: int | None = None) -> bool:
        assert largest is not None
        self.largest = largest
        return True

    def process_bytes(self) -> dict[str, int]:
        return {"VmSize": self.used}

    def attempt(self, units: int, validate: bool = True) -> TrialStep | None:
        on_heap = self.largest == LARGEST_HEAP
        if on_heap:
            self.tried.append(units)
        peak = (HELD + ROW * units) * (self.growth if on_heap else 1)
        seconds = (self.constant + units / 1000) * (1 if on_heap else self.slower)
        return None if peak > FREE else TrialStep(units, round(peak), seconds)

    def find(self, monkeypatch: pytest.MonkeyPatch, least: int = 1, **options: Any) -> tuple[Answer, Answer | None]:
        """The answer with pages of their own, and on the heap."""
        monkeypatch.setattr(heap, "limit_malloc", self.limit_malloc)
        monkeypatch.setattr(heap, "process_bytes", self.process_bytes)
        values = {"margin": 0.1, "min_speedup": 0.05, "default": 1, "step": 4, **options}
        search = Search(self.attempt, lambda: FREE, **values)
        answer = search.run()
        return answer, heap.try_heap(self, search, answer, least=least)  # type: ignore[arg-type]


def test_a_size_that_speed_has_ended_is_kept_and_comes_from_the_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    answer, found = machine.find(monkeypatch, default=64)
    assert answer.units == 64
    assert found == answer
    assert machine.largest == LARGEST_HEAP


def test_larger_sizes_are_tried_on_the_heap_as_long_as_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant(Machine):
        """A step's constant part is the same with both, so that it counts more on the heap."""

        def attempt(self, units: int, validate: bool = True) -> TrialStep | None:
            step = super().attempt(units, validate)
            on_heap = self.largest == LARGEST_HEAP
            return step and TrialStep(units, step.peak, 0.01 + units / (1000 if on_heap else 100))

    machine = Constant()
    answer, found = machine.find(monkeypatch)
    assert answer.units == 16  # twice as much brings 3 %
    assert found is not None
    assert (found.units, found.reason) == (128, answer.reason)  # twice as much brings 4 %
    assert sorted(set(machine.tried)) == [16, 32, 64, 128, 256]


def test_half_of_what_fits_is_taken_where_it_is_faster_on_the_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, found = Machine().find(monkeypatch, min_speedup=0.0, largest=10_000)
    assert answer.units > 800
    assert found is not None
    assert found.units == 490  # 5,000 of 10,000 bytes with pages of its own
    assert found.reason == (
        f"more units a second than {4 * answer.units:,} (as much as the limit is predicted to allow, less 10% of the "
        "activations), whose tensors do not fit into the heap"
    )


@pytest.mark.parametrize(
    ("machine", "least"),
    [
        (Machine(slower=0.9), 1),  # not faster
        (Machine(growth=1.9), 1),  # above the margin
        (Machine(growth=2.5), 1),  # out of memory
        (Machine(), 500),  # too small for the loader, or as much as fits was asked for
    ],
)
def test_tensors_keep_pages_of_their_own(machine: Machine, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = machine.find(monkeypatch, least, min_speedup=0.0)
    assert found is None
    assert machine.largest == SMALLEST_HEAP


def test_what_the_heap_keeps_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Keeps(Machine):
        def attempt(self, units: int, validate: bool = True) -> TrialStep | None:
            self.used += 3_000  # a hole that nothing fits into
            return super().attempt(units, validate)

    machine = Keeps()
    assert machine.find(monkeypatch, default=64)[1] is None
    assert machine.largest == SMALLEST_HEAP


def test_without_a_limit_on_the_address_space_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    monkeypatch.setattr(machine, "limit_malloc", lambda largest=None: False)
    assert machine.find(monkeypatch)[1] is None
    assert machine.tried == []


@pytest.mark.usefixtures("forgetful")
@pytest.mark.filterwarnings("ignore:Found . module.* in eval mode")
@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_later_runs_take_what_was_found_until_a_step_ran_out_of_memory(
    use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []
    monkeypatch.setattr(finder_module, "limit_malloc", asked.append)
    monkeypatch.setattr(finder_module, "try_heap", lambda probe, search, answer, least: answer)
    search(use)
    assert asked == [SMALLEST_HEAP, LARGEST_HEAP]
    cache_module.forget()  # but not the file
    _, finder = search(use)
    assert asked[2:] == [LARGEST_HEAP]
    assert finder.micro_batch_size is not None
    finder.lower(finder.micro_batch_size - 1)
    assert asked[3:] == [SMALLEST_HEAP]
    search(use)
    assert asked[4:] == [SMALLEST_HEAP]
