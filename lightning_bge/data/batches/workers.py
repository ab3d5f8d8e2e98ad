"""How many processes assemble batches: chosen by measurement, for any loader."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from statistics import mean, median
from typing import Any

from torch import Tensor

from lightning_bge.errors import ConfigError

log = logging.getLogger(__name__)

# The least of the training process's own time that taking over a batch from a worker costs, in seconds: half of what
# was measured (docs/loading.md), as another machine may be twice as fast. Each tensor is handed over on its own.
HAND_OVER_BATCH, HAND_OVER_TENSOR = 4e-4, 9e-5
# Assembling that takes less of a step than this is not worth a process.
NEGLIGIBLE = 0.01
# Fewer workers are taken where they come so near to the best.
TOLERANCE = 0.05
# A worker has this many batches ready before anyone asks (torch's default), which must not be timed as its pace.
PREFETCHED = 2


@dataclass(frozen=True)
class LoaderChoice:
    """How many workers, and why.

    Attributes:
        num_workers: 0 assembles batches in the training process.
        reason: in words, with what was measured.
        measured: seconds a batch by number of workers, without their start.
    """

    num_workers: int
    reason: str
    measured: dict[int, float]


def choose_workers(
    make_loader: Callable[[int], Iterable[Any]],
    candidates: Sequence[int] | None = None,
    *,
    batches: int = 20,
    step_seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> LoaderChoice:
    """Choose the number of a loader's worker processes by timing it.

    Batches are assembled in this process first. No process is started where that costs less than taking a batch over
    from a worker, or under 1 % of a step. Otherwise each candidate is started and timed, and the fewest workers within
    5 % of the best are taken.

    Args:
        make_loader: gives a fresh loader with so many workers, 0 too, of `batches` batches and some more. Its batches
            are thrown away: its order and random state are its own matter.
        candidates: numbers of workers to try. Unset: 1, 2, 4 ... up to the cores less 2, one for training and one for
            everything else.
        batches: how many to time for each number.
        step_seconds: what a training step takes on its own; workers assemble during a step, this process before it.
            Unset: the loaders' own paces are compared.
        clock: seconds.

    Raises:
        ConfigError: a candidate or `batches` below 1.
    """
    tried = worker_candidates() if candidates is None else tuple(candidates)
    if batches < 1 or min(tried, default=1) < 1:
        raise ConfigError(f"choose_workers: expected batches and candidates from 1 up, got {batches} and {tried}")
    _, seconds, tensors = _time(make_loader(0), 1, batches, clock)
    if not seconds:
        return LoaderChoice(0, "the loader gives too few batches to be timed", {})
    # The fastest one decides whether processes are started at all: a busy machine must not start them.
    fastest, hand_over = min(seconds), HAND_OVER_BATCH + HAND_OVER_TENSOR * tensors
    measured, starts, step = {0: median(seconds)}, {}, step_seconds or 0.0
    cheap = f"a batch is assembled in {_ms(fastest)} at best"
    if fastest <= hand_over:
        return LoaderChoice(0, f"{cheap}, to take it over from a worker costs {_ms(hand_over)} or more", measured)
    if fastest <= NEGLIGIBLE * step:
        return LoaderChoice(0, f"{cheap}, under {NEGLIGIBLE:.0%} of a step of {_ms(step)}", measured)

    for workers in sorted(set(tried)):
        start, seconds, _ = _time(make_loader(workers), 1 + PREFETCHED * workers, batches, clock)
        if seconds:
            measured[workers], starts[workers] = mean(seconds), start
            if measured[workers] <= step:
                break  # more could not make a step any shorter
    costs = {workers: max(step, pace) if workers else step + pace for workers, pace in measured.items()}
    best = min(costs.values())
    chosen = min(workers for workers, cost in costs.items() if cost <= best * (1 + TOLERANCE))
    return LoaderChoice(chosen, _explain(measured, step_seconds, starts.get(chosen)), measured)


def worker_candidates() -> tuple[int, ...]:
    """1, 2, 4 ... and the cores that this process may use less 2, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(1, cores - 2)
    return (*(2**k for k in range(most.bit_length()) if 2**k < most), most)


_choices: dict[Hashable, LoaderChoice] = {}


def choose_once(key: Hashable, choose: Callable[[], LoaderChoice]) -> LoaderChoice:
    """What `choose` answered for `key` in this process; asked the first time only, and logged where it is new."""
    if key not in _choices:
        choice = choose()
        if choice.num_workers not in {known.num_workers for known in _choices.values()}:
            log.info("num_workers %d: %s", choice.num_workers, choice.reason)
        _choices[key] = choice
    return _choices[key]


def _time(loader: Iterable[Any], skip: int, batches: int, clock: Callable[[], float]) -> tuple[float, list[float], int]:
    """Seconds to the first batch, seconds for each batch after the first `skip`, tensors in a batch."""
    start, seconds, tensors = 0.0, [], 0
    before = clock()
    for number, batch in enumerate(loader):
        passed = clock() - before
        if number == 0:
            start, tensors = passed, count_tensors(batch)
        if number >= skip:
            seconds.append(passed)
        if len(seconds) == batches:
            break
        before = clock()
    return start, seconds, tensors


def count_tensors(batch: Any) -> int:
    """Tensors in a batch of mappings, sequences and dataclasses; each is handed over on its own."""
    if isinstance(batch, Tensor):
        return 1
    if isinstance(batch, Mapping):
        return sum(map(count_tensors, batch.values()))
    if isinstance(batch, list | tuple):
        return sum(map(count_tensors, batch))
    if is_dataclass(batch):
        return sum(count_tensors(getattr(batch, field.name)) for field in fields(batch))
    return 0


def _explain(measured: dict[int, float], step_seconds: float | None, start: float | None) -> str:
    paces = ", ".join(f"{_ms(pace)} with {workers}" for workers, pace in measured.items() if workers)
    text = f"a batch takes {_ms(measured[0])} in this process, {paces or 'no worker could be timed'}"
    text += f"; a step takes {_ms(step_seconds)}" if step_seconds is not None else ""
    return text + (f"; starting them takes {start:.1f} s for each run" if start is not None else "")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"
