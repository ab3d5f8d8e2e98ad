"""Under a limit on the address space: whether a step's tensors come from the C library's heap."""

from lightning_bge.callbacks.micro_batch.probe import Probe
from lightning_bge.callbacks.micro_batch.search import Answer, Search
from lightning_bge.runtime.memory import LARGEST_HEAP, SMALLEST_HEAP, limit_malloc, process_bytes

HEAP_GROWTH = 2.0  # times as much was the most that a step took on the heap, which gets holes: docs/log.md
TIMED = 3  # steps, after one that grows the heap


def try_heap(probe: Probe, search: Search, answer: Answer, *, least: int) -> Answer | None:
    """Try steps whose tensors come from the heap, which keeps their pages, where they are expected to fit.

    They are faster than steps whose tensors have pages of their own, often even in smaller batches, and gain more from
    larger ones. They are taken where they leave the margin and train more units a second.

    Args:
        probe: makes the steps.
        search: has run while tensors had pages of their own.
        answer: its answer.
        least: units; below them the answer stays.

    Returns:
        The size to train with tensors from the heap; None: tensors keep pages of their own, and the answer stays.
    """
    free = search.measure_free()
    if free is None or not limit_malloc(LARGEST_HEAP):
        return None
    fitting = min(int(search.largest_within(free / HEAP_GROWTH)), search.largest)
    best, speed, size = None, search.speed(answer.units), min(answer.units, fitting)
    while max(least, 1) <= size <= fitting:
        found = _speed_on_heap(probe, size, (1 - search.margin) * free)
        if found is None or found < speed * (1 + (0 if best is None else search.min_speedup or 0)):
            break
        best, speed, size = size, found, 2 * size
    if best is None:
        limit_malloc(SMALLEST_HEAP)
        return None
    if best >= answer.units:
        return search.answer(best, answer.reason)
    larger = f"{answer.units * search.step:,} ({answer.reason}), whose tensors do not fit into the heap"
    return search.answer(best, f"more units a second than {larger}")


def _speed_on_heap(probe: Probe, units: int, most: float) -> float | None:
    """The most units a second of a few steps; None: they take more than `most` bytes."""
    before = process_bytes()["VmSize"]
    first = probe.attempt(units)
    again = [] if first is None else [probe.attempt(units, False) for _ in range(TIMED)]
    kept = process_bytes()["VmSize"] - before
    if first is None or None in again or max(first.peak, kept) > most:
        return None
    return units / min(step.seconds for step in again if step is not None)
