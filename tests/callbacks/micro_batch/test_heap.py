"""Whether the tensors of a step come from the C library's heap, where address space is limited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lightning_bge.callbacks.micro_batch import cache as cache_module
from lightning_bge.callbacks.micro_batch import finder as finder_module
from lightning_bge.callbacks.micro_batch import heap
from lightning_bge.callbacks.micro_batch.cache import FoundSize
from lightning_bge.callbacks.micro_batch.heap import choose_heap
from lightning_bge.callbacks.micro_batch.search import Answer, Search, TrialStep
from lightning_bge.runtime.memory import LARGEST_HEAP, SMALLEST_HEAP
from tests.helpers.trial_steps import Use, search

ROW, HELD = 10, 100  # bytes of a step: of a unit, and those that each step takes
FREE = 10_000  # of which 9,000 may be used with the margin


class Machine:
    """Steps take `slower` times as long while their tensors have pages of their own.

    On the heap they take `growth` times as much memory, of which the heap keeps a part for each size.

    Args:
        slower: how much.
        growth: how many times as much.
        kept: the part.
        constant: seconds of a step besides those of its units.
        cold: the first step of a size takes so many times as long.
    """

    def __init__(
        self,
        slower: float = 1.5,
        growth: float = 1.5,
        kept: float = 0.0,
        constant: float = 0.0,
        cold: float = 1.0,
    ) -> None:
        self.slower, self.growth, self.kept, self.constant, self.cold = slower, growth, kept, constant, cold
        self.largest = SMALLEST_HEAP
        self.on_heap: list[int] = []
        self.seen: set[tuple[int, int]] = set()
        self.held = self.peak = 0.0

    def limit_malloc(self, largest: int | None = None) -> bool:
        assert largest is not None
        self.largest = largest
        return True

    def process_bytes(self) -> dict[str, int]:
        return {"VmSize": round(self.held), "VmPeak": round(self.peak)}

    def attempt(self, units: int, validate: bool = True) -> TrialStep | None:
        on_heap, new = self.largest == LARGEST_HEAP, (units, self.largest) not in self.seen
        self.seen.add((units, self.largest))
        peak = HELD + ROW * units
        if on_heap:
            self.on_heap.append(units)
            peak = round(peak * self.growth)
            self.held += peak * self.kept * new
        else:
            peak += round(self.held)
        if peak > FREE:
            return None
        self.peak = max(self.peak, peak)
        seconds = (self.constant + units / 1000 * (1 if on_heap else self.slower)) * (self.cold if new else 1)
        return TrialStep(units, peak, seconds)

    def choose(
        self,
        monkeypatch: pytest.MonkeyPatch,
        least: int = 1,
        trained: Callable[[int], int] = lambda units: units,
        **options: Any,
    ) -> tuple[Answer, Answer, int | None]:
        """The answer with pages of their own, what is chosen, and from where its tensors come."""
        monkeypatch.setattr(heap, "limit_malloc", self.limit_malloc)
        monkeypatch.setattr(heap, "process_bytes", self.process_bytes)
        values = {"margin": 0.1, "min_speedup": 0.05, "default": 1, "step": 4, **options}
        found = Search(self.attempt, lambda: round(FREE - self.held), **values)
        answer = found.run()
        return answer, *choose_heap(self, found, answer, least=least, trained=trained)  # type: ignore[arg-type]


def test_a_size_that_speed_has_ended_is_kept_and_comes_from_the_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    answer, chosen, size = machine.choose(monkeypatch, default=64)
    assert (answer.units, chosen.units) == (64, 64)
    assert size == machine.largest == LARGEST_HEAP
    assert chosen.reason == (
        f"+50% units a second with tensors from the heap over 256 with pages of their own, where {answer.reason}"
    )
    assert chosen.peak == 1.5 * (HELD + ROW * 64)


def test_larger_sizes_are_tried_on_the_heap_as_long_as_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(slower=10, constant=0.01)  # the constant part counts more on the heap
    answer, chosen, _ = machine.choose(monkeypatch)
    assert answer.units == 16  # twice as much brings 3 %
    assert chosen.units == 128  # twice as much brings 4 %
    assert sorted(set(machine.on_heap)) == [16, 32, 64, 128, 256]
    assert chosen.reason.endswith(f"over 64 with pages of their own, where {answer.reason}")


def test_half_of_what_fits_is_taken_where_it_is_faster_on_the_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, chosen, size = Machine().choose(monkeypatch, min_speedup=0.0, largest=10_000)
    assert answer.units > 800
    assert (chosen.units, size) == (440, LARGEST_HEAP)  # 4,500 of the 9,000 bytes with pages of its own


def test_sizes_are_tried_as_they_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(units: int) -> int:
        return 1 << (units.bit_length() - 1)

    machine = Machine(constant=0.01)
    _, chosen, _ = machine.choose(monkeypatch, trained=trained, min_speedup=0.0, largest=10_000)
    assert set(machine.on_heap) == {chosen.units} == {256}


@pytest.mark.parametrize("slower", [0.9, 1.03])
def test_a_smaller_size_has_to_bring_as_much_as_a_larger_one(slower: float, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(slower=slower, growth=1.0)
    machine.limit_malloc(SMALLEST_HEAP)
    answer = Answer(800, "as much as the limit is predicted to allow")
    monkeypatch.setattr(heap, "limit_malloc", machine.limit_malloc)
    monkeypatch.setattr(heap, "process_bytes", machine.process_bytes)
    found = Search(machine.attempt, lambda: FREE, margin=0.1, min_speedup=0.05, default=1)
    for units in (1, 2, 400, 800):
        found._try(units)
    assert choose_heap(machine, found, answer, least=1, trained=lambda units: units) == (answer, SMALLEST_HEAP)  # type: ignore[arg-type]
    assert set(machine.on_heap) == {440}


def test_the_first_step_of_a_size_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of both kinds are as fast but for the first of each size, which the search has timed alone."""
    machine = Machine(slower=1.0, growth=1.0, constant=0.01, cold=1.5)
    answer, chosen, size = machine.choose(monkeypatch, min_speedup=0.0, default=10_000)
    assert answer.units > 800
    assert (chosen.units, size) == (answer.units, SMALLEST_HEAP)


@pytest.mark.parametrize("growth", [2.1, 2.5])  # above the margin, out of memory
def test_what_takes_too_much_on_the_heap_keeps_pages_of_its_own(growth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(growth=growth)
    answer, chosen, size = machine.choose(monkeypatch, min_speedup=0.0)
    assert machine.on_heap
    assert (chosen, size) == (answer, machine.largest) == (answer, SMALLEST_HEAP)


def test_what_earlier_steps_left_on_the_heap_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(slower=10, constant=0.01, growth=1.9, kept=1.0)
    _, chosen, size = machine.choose(monkeypatch, default=64, min_speedup=0.02)
    assert sorted(set(machine.on_heap)) == [64, 128, 256]  # 1,406, 2,622 and 5,054 bytes
    assert (chosen.units, size) == (128, LARGEST_HEAP)


def test_the_answer_is_lowered_where_the_heap_has_kept_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(growth=2.1, kept=0.3)
    answer, chosen, size = machine.choose(monkeypatch, min_speedup=0.0)
    assert size == SMALLEST_HEAP
    assert chosen.units < answer.units
    assert chosen.reason.endswith("of what trials have left free")
    assert HELD + ROW * chosen.units <= 0.9 * (FREE - machine.held) + HELD


def test_nothing_smaller_than_what_is_wanted_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    answer, chosen, size = machine.choose(monkeypatch, 500, min_speedup=0.0)
    assert (chosen, size, machine.on_heap) == (answer, SMALLEST_HEAP, [])


def test_without_a_limit_on_the_address_space_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    monkeypatch.setattr(machine, "limit_malloc", lambda largest=None: False)
    answer, chosen, size = machine.choose(monkeypatch)
    assert (chosen, size, machine.on_heap) == (answer, None, [])


def test_the_smaller_of_equal_sizes_settings_is_kept() -> None:
    sizes = cache_module.MicroBatchSizes(None)
    cache_module.forget()
    sizes.put("a", FoundSize(8, "a", SMALLEST_HEAP))
    assert min(FoundSize(8, "a", LARGEST_HEAP), FoundSize(8, "b"), key=cache_module._size).heap is None
    assert sizes.get("a") == FoundSize(8, "a", SMALLEST_HEAP)
    cache_module.forget()


@pytest.mark.usefixtures("forgetful")
@pytest.mark.filterwarnings("ignore:Found . module.* in eval mode")
@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_later_runs_take_what_was_found_until_a_step_ran_out_of_memory(
    use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []
    monkeypatch.setattr(finder_module, "limit_malloc", lambda largest=None: asked.append(largest))
    monkeypatch.setattr(finder_module, "choose_heap", lambda probe, search, answer, **_: (answer, LARGEST_HEAP))
    search(use)
    assert asked == [None, SMALLEST_HEAP, LARGEST_HEAP, None]  # before, in the search, in training, after it
    cache_module.forget()  # but not the file
    _, finder = search(use)
    assert asked[4:] == [None, LARGEST_HEAP, None]
    assert finder.micro_batch_size is not None
    finder.lower(finder.micro_batch_size - 1)
    search(use)
    assert asked[7:] == [None, SMALLEST_HEAP, None]
