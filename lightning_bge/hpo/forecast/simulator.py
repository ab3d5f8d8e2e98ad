"""A search run forward in milliseconds: which trials go how far, on how many workers, and what that takes.

`asha` is run by its own rules with standings that stay sorted, so that 2,000 trials take milliseconds, where
`replay.replay_asha` takes minutes; other pruners are asked themselves, by `replay.replay_pruned`.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np

Entry = tuple[float, int]  # a value, lower is better, and the point
STARTUP = 10  # points that Optuna's TPE draws at random before it learns
FREE = -1  # in a point's place: the worker has nothing to do
Value = Callable[[int, int], float]  # a point's value at a rung, higher is better; asked once, when it gets there


@dataclass(frozen=True)
class Prices:
    """What the parts of each point of a search take, in seconds; N points of R reports, and S rungs.

    Attributes:
        begin: [N], to begin a trial or to go on with it, besides what its folds take.
        reports: [N, R], each report: the fold's start where it is the fold's first, training, validation.
        pause: [N, S], to write a checkpoint at a rung.
        resume: [N, S], to read it, and to start its fold once more.
    """

    begin: np.ndarray
    reports: np.ndarray
    pause: np.ndarray
    resume: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """How a search went.

    Attributes:
        reports: that each point made.
        visits: how often each was begun or resumed; 0: never.
        seconds: of all workers together, while they trained.
        wall: until the last of them was done.
    """

    reports: tuple[int, ...]
    visits: tuple[int, ...]
    seconds: float
    wall: float

    def complete(self, reports: int) -> int:
        """Trials that made all of so many reports."""
        return sum(made == reports for made in self.reports)


class Running(NamedTuple):
    """A trial that is being trained.

    Attributes:
        at: seconds until it reaches the next rung.
        point: its point.
        stage: that rung, from 0; their number: the end.
        first: whether it is its point's first trial.
    """

    at: float
    point: int
    stage: int
    first: bool


class Halving:
    """The standings of `asha`: who stands where, who is paused, who goes on next.

    The rules are those of `promote.next_resumed` and `promote.last_resumed`; what differs is that each rung stays
    sorted.

    Args:
        rungs: number of them.
        eta: one in so many of a rung's points goes on.
        points: how many there will be in all.
    """

    def __init__(self, rungs: int, eta: int, points: int) -> None:
        self.eta, self.points = eta, points
        self.ranked: list[list[Entry]] = [[] for _ in range(rungs)]
        self.paused: list[list[Entry]] = [[] for _ in range(rungs)]
        self.complete = False

    def copy(self) -> Halving:
        """The same standings, to be changed on their own."""
        found = Halving(0, self.eta, self.points)
        found.ranked, found.paused = [list(rung) for rung in self.ranked], [list(rung) for rung in self.paused]
        found.complete = self.complete
        return found

    def arrive(self, point: int, rung: int, value: float, pauses: bool = True) -> int:
        """A point has reached a rung; return its place there, from 0.

        Args:
            point: its number.
            rung: which one, from 0.
            value: there, higher is better.
            pauses: and can be resumed.
        """
        entry = (-value, point)
        place = bisect_left(self.ranked[rung], entry)
        self.ranked[rung].insert(place, entry)
        if pauses:
            insort(self.paused[rung], entry)
        return place

    def next(self) -> tuple[int, int] | None:
        """The paused point that has earned to go on, and the rung where it stands; None: there is none."""
        for rung in reversed(range(len(self.ranked))):
            ranked, paused = self.ranked[rung], self.paused[rung]
            if paused and bisect_left(ranked, paused[0]) < len(ranked) // self.eta:
                return paused[0][1], rung
        return None

    def last(self) -> tuple[int, int] | None:
        """Where none is complete and nothing else is left: the best paused point of the highest rung."""
        for rung in reversed(range(len(self.paused))):
            if self.paused[rung] and not self.complete:
                return self.paused[rung][0][1], rung
        return None

    def go_on(self, rung: int) -> None:
        """The best paused point of a rung is resumed."""
        del self.paused[rung][0]


@dataclass
class Promoted:
    """A search with `asha`, at any time of it.

    Attributes:
        halving: the standings.
        steps: the rungs' reports.
        total: reports of a trial that runs to its end.
        ended: points whose first trial has ended.
        begun: points begun so far; the next one has this number.
        running: one for each worker that is at it.
    """

    halving: Halving
    steps: tuple[int, ...]
    total: int
    ended: int = 0
    begun: int = 0
    running: Sequence[Running] = ()

    def run(self, value: Value, prices: Prices, workers: int) -> Outcome:
        """Run it to its end; it is spent afterwards.

        As in a study, a worker that finds nothing to do leaves, and one that is free begins a new trial as long as too
        few have *ended*.

        Args:
            value: of a point at a rung.
            prices: of as many points as there will be, and `workers` more.
            workers: processes that share the search.
        """
        ends = [*self.steps, self.total]
        reports, visits = [0] * len(prices.begin), [0] * len(prices.begin)
        now = seconds = 0.0
        events: list[tuple[float, int, int, int, bool]] = [
            (at, number, point, stage, first) for number, (at, point, stage, first) in enumerate(self.running)
        ]
        events += [(0.0, len(events) + number, FREE, 0, False) for number in range(workers - len(events))]
        heapq.heapify(events)
        for number in count(len(events)):
            if not events:
                break
            now, _, point, stage, first = heapq.heappop(events)
            if point == FREE:
                busy = any(event[2] != FREE for event in events)
                if (visit := self._start(prices, ends, busy)) is None:
                    continue  # it leaves
                point, stage, took = visit
                visits[point] += 1
                following = (point, stage, stage == 0)
            else:
                reports[point] = ends[stage]
                took, goes_on = self._reach(value, prices, ends, point, stage)
                self.ended += first and not goes_on
                following = (point, stage + 1, first) if goes_on else (FREE, 0, False)
            seconds += took
            heapq.heappush(events, (now + took, number, *following))
        return Outcome(tuple(reports), tuple(visits), seconds, now)

    def _reach(self, value: Value, prices: Prices, ends: Sequence[int], point: int, stage: int) -> tuple[float, bool]:
        """A point has reached a rung or its end: seconds of what its worker does now, and whether it goes on."""
        halving = self.halving
        if stage == len(self.steps):
            halving.complete = True
            return 0.0, False
        place = halving.arrive(point, stage, value(point, stage))
        if halving.next() == (point, stage):  # it would be the next one anyway, and does not pause
            halving.go_on(stage)
            return _between(prices, ends, point, stage + 1), True
        # what too many stand above can't be resumed, and needs no checkpoint
        return float(prices.pause[point, stage]) * (place < halving.points // halving.eta), False

    def _start(self, prices: Prices, ends: Sequence[int], busy: bool) -> tuple[int, int, float] | None:
        """What a free worker does next: the point, the rung that it goes to, and the seconds until it gets there."""
        halving = self.halving
        found = halving.next()
        if found is None and self.ended < halving.points and self.begun < len(prices.begin):
            point = self.begun
            self.begun += 1
            return point, 0, float(prices.begin[point]) + _between(prices, ends, point, 0)
        if found is None and not busy:
            found = halving.last()
        if found is None:
            return None
        point, rung = found
        halving.go_on(rung)
        again = float(prices.begin[point] + prices.resume[point, rung])
        return point, rung + 1, again + _between(prices, ends, point, rung + 1)


def skill(random: np.random.Generator) -> float:
    """How good the points of a sampler that learns are: each stands at u ** skill among those before it, u in 0 to 1.

    Drawn at random between a sampler that learns nothing (1, half of them above) and one that is good (3.2, 24 %
    above). With TPE 25 to 44 % were above, in studies of made-up functions and in six searches on the generated sample.
    """
    return float(random.uniform(1.0, 3.2))


def _between(prices: Prices, ends: Sequence[int], point: int, stage: int) -> float:
    """Seconds of the reports that lead to a rung from the one before."""
    return float(prices.reports[point, ends[stage - 1] if stage else 0 : ends[stage]].sum())


def schedule(seconds: Sequence[float], workers: int) -> float:
    """When the last of these jobs is done, each of which the first free worker takes, in their order."""
    free = [0.0] * workers
    for job in seconds:
        heapq.heapreplace(free, free[0] + job)
    return max(free)


def simulate_asha(
    steps: Sequence[int], eta: int, points: int, values: np.ndarray, prices: Prices, workers: int
) -> Outcome:
    """A whole search with `asha` over given curves.

    Args:
        steps: the rungs' reports, ascending.
        eta: one in so many of a rung's points goes on.
        points: trials of the study.
        values: [N, R], what each point reports, higher is better; N is `points` and a few more, which several workers
            may begin beyond them.
        prices: of the N points.
        workers: processes that share the search.
    """
    search = Promoted(Halving(len(steps), eta, points), tuple(steps), values.shape[1])
    at_rungs = values[:, np.asarray(steps, dtype=int) - 1]
    return search.run(lambda point, rung: float(at_rungs[point, rung]), prices, workers)
