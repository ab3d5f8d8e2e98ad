"""Under a limit on the address space: whether a step's tensors come from the C library's heap."""

from collections.abc import Callable

from lightning_bge.callbacks.micro_batch.probe import Probe
from lightning_bge.callbacks.micro_batch.search import LONG_S, Answer, Search, TrialStep
from lightning_bge.runtime.memory import LARGEST_HEAP, SMALLEST_HEAP, limit_malloc, process_bytes

HEAP_GROWTH = 2.0  # times as much was the most that steps took with all tensors from the heap: docs/log.md
TIMED = 3  # steps after the first, unless that is long


def choose_heap(
    probe: Probe, search: Search, answer: Answer, *, least: int, trained: Callable[[int], int]
) -> tuple[Answer, int | None]:
    """Try steps whose tensors come from the heap, which keeps their pages, where they are expected to fit.

    They are faster than steps whose tensors have pages of their own, often even in smaller batches, and gain more from
    larger ones. They are taken where they leave the margin and train more units a second; where the size is not the
    same, more by the search's `min_speedup` for each change.

    Args:
        probe: makes the steps.
        search: has run while tensors had pages of their own.
        answer: its answer.
        least: units; nothing smaller is tried.
        trained: units that training takes of a size.

    Returns:
        The size, and bytes for `limit_malloc`, which is in effect then. None: there is no such limit. The size of
        steps that keep pages of their own is lowered where trying the heap has left less memory free.
    """
    free = search.measure_free()
    if free is None or not limit_malloc(SMALLEST_HEAP):
        return answer, None
    room = (1 - search.margin) * free
    fitting = min(int(search.largest_within(room / HEAP_GROWTH)), search.largest)
    size = trained(min(answer.units, fitting)) if fitting > 0 else 0
    if not least <= size <= fitting:
        return answer, SMALLEST_HEAP
    before = process_bytes()
    pages = _measure(probe, trained(answer.units), before)
    limit_malloc(LARGEST_HEAP)
    best = None if pages is None else _climb(probe, search, pages, size, (fitting, room), trained, before)
    if best is not None and pages is not None:
        gain = _speed(best) / _speed(pages) - 1
        own = f"{pages.units * search.step:,} with pages of their own, where {answer.reason}"
        reason = f"{gain:+.0%} units a second with tensors from the heap over {own}"
        return Answer(best.units, reason, best.peak), LARGEST_HEAP
    limit_malloc(SMALLEST_HEAP)
    left = search.measure_free()
    most = answer.units if left is None else search.within_margin(left)
    if most < answer.units:
        answer = search.answer(max(trained(most), least), f"{answer.reason}, of what trials have left free")
    return answer, SMALLEST_HEAP


def _climb(
    probe: Probe,
    search: Search,
    pages: TrialStep,
    size: int,
    most: tuple[int, float],
    trained: Callable[[int], int],
    before: dict[str, int],
) -> TrialStep | None:
    """The largest size that pays on the heap, doubling it; None: none does."""
    fitting, room = most
    more = 1 + (search.min_speedup or 0)
    best, wanted = None, _speed(pages) * (1 if size == pages.units else more)
    while size <= fitting:
        found = _measure(probe, size, before)
        search.tried.append((size, None, None) if found is None else (size, found.peak, found.seconds))
        if found is None or found.peak > room or _speed(found) < wanted:
            break
        # beside a short step Lightning's own work for each batch counts, which a larger size saves: it may be as slow
        best, wanted = found, _speed(found) * (more if found.seconds >= search.shortest_s else 1 / more)
        size = trained(2 * size)
        if size <= best.units:
            break
    return best


def _measure(probe: Probe, units: int, before: dict[str, int]) -> TrialStep | None:
    """The shortest of a few steps, and the most bytes that any took above what was held before; None: out of memory."""
    first = probe.attempt(units)
    if first is None:
        return None
    seconds = first.seconds
    for _ in range(TIMED if seconds <= LONG_S else 0):
        again = probe.attempt(units, False)
        if again is None:
            return None
        seconds = min(seconds, again.seconds)
    now = process_bytes()
    # can't be reset: where it is not a new one, steps with pages of their own took as much
    peak = now["VmPeak"] if now["VmPeak"] > before["VmPeak"] else 0
    return TrialStep(units, max(first.peak, peak - before["VmSize"], now["VmSize"] - before["VmSize"]), seconds)


def _speed(step: TrialStep) -> float:
    return step.units / max(step.seconds, 1e-9)
