"""The rules of asynchronous successive halving: who pauses, who is resumed next, and who can never be resumed.

One state machine, without Optuna, torch or a clock. A study runs it (`AshaPruner`, `StudyQueue`); the preview, the
time left, the replay of recorded searches and `lightning-bge plan` run it too (`hpo.forecast`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping

Entry = tuple[float, int]  # a value with its sign changed, so that the best one sorts first, and the parameter set


def rung_steps(n_steps: int, first: int, reduction_factor: int) -> tuple[int, ...]:
    """The steps at which trials pause: first, first * reduction_factor, first * reduction_factor**2 ..., below n_steps.

    Args:
        n_steps: steps of a trial that runs to its end.
        first: the step of the first rung.
        reduction_factor: the factor from one rung to the next.
    """
    found, step = [], first
    while step < n_steps:
        found.append(step)
        step *= reduction_factor
    return tuple(found)


class Halving:
    """The state of asynchronous successive halving (ASHA; Li et al., arXiv:1810.05934).

    A parameter set pauses at each rung that it reaches, unless it is the one that would be resumed next anyway. When a
    worker is free, the best paused parameter set that is in the top 1/reduction_factor of its rung is resumed, the
    highest rung first; where there is none, a new parameter set starts. Of equal values the lower number is better.

    Each rung is kept sorted, so that a decision takes logarithmic time.

    Args:
        n_rungs: number of rungs.
        reduction_factor: of the parameter sets that reach a rung, one in this many trains on.

    Attributes:
        ranking: for each rung all parameter sets that have reached it, the best first.
    """

    def __init__(self, n_rungs: int, reduction_factor: int) -> None:
        self.reduction_factor = reduction_factor
        self.ranking: list[list[Entry]] = [[] for _ in range(n_rungs)]
        self._paused: list[list[Entry]] = [[] for _ in range(n_rungs)]
        self._last: dict[int, tuple[int, Entry]] = {}  # the highest rung that a parameter set has reached
        self._any_complete = False

    def copy(self) -> Halving:
        """The same state, to be changed independently."""
        found = Halving(0, self.reduction_factor)
        found.ranking, found._paused = [list(rung) for rung in self.ranking], [list(rung) for rung in self._paused]
        found._last, found._any_complete = dict(self._last), self._any_complete
        return found

    def add(self, parameter_set: int, rung: int, value: float, paused: bool) -> int:
        """Record what a parameter set has at a rung.

        Args:
            parameter_set: its number.
            rung: from 0. Those of one parameter set are recorded in ascending order.
            value: higher is better.
            paused: whether it is paused there and can be resumed.

        Returns:
            Its place in the rung's ranking so far, from 0.
        """
        entry = (-value, parameter_set)
        place = bisect_left(self.ranking[rung], entry)
        self.ranking[rung].insert(place, entry)
        self._last[parameter_set] = rung, entry
        if paused:
            insort(self._paused[rung], entry)
        return place

    def arrive(self, parameter_set: int, rung: int, value: float) -> bool:
        """Record that a running parameter set reaches a rung, and decide whether it pauses there.

        Returns:
            False where it is the one to be resumed next: it trains on without a pause.
        """
        self.add(parameter_set, rung, value, paused=True)
        if self.next_resumed() != parameter_set:
            return True
        self.resume(parameter_set)
        return False

    def next_resumed(self, nothing_else: bool = False) -> int | None:
        """The paused parameter set to be resumed next; None: start a new one.

        Args:
            nothing_else: nothing runs, and no parameter set is left to start. Then, as long as none is complete, the
                best paused one of the highest rung is resumed even if it is not in the top share: a search ends with
                a complete trial.
        """
        for ranked, paused in zip(reversed(self.ranking), reversed(self._paused), strict=True):
            if paused and bisect_left(ranked, paused[0]) < len(ranked) // self.reduction_factor:
                return paused[0][1]
        return self.best_paused() if nothing_else else None

    def best_paused(self) -> int | None:
        """The best paused parameter set of the highest rung; None: there is none, or one is complete already."""
        return next((paused[0][1] for paused in reversed(self._paused) if paused and not self._any_complete), None)

    def resume(self, parameter_set: int) -> int:
        """Record that a paused parameter set is resumed; returns the rung at which it was paused."""
        rung, entry = self._last[parameter_set]
        paused = self._paused[rung]
        del paused[bisect_left(paused, entry)]
        return rung

    def pause(self, parameter_set: int) -> None:
        """Record that a parameter set has paused at the last rung that it has reached, and can be resumed."""
        rung, entry = self._last[parameter_set]
        insort(self._paused[rung], entry)

    def remove(self, parameter_set: int, values: Mapping[int, float]) -> None:
        """Leave out a parameter set.

        Args:
            parameter_set: its number.
            values: what it has at each rung that it has reached.
        """
        for rung, value in values.items():
            entry = (-value, parameter_set)
            for entries in (self.ranking[rung], self._paused[rung]):
                place = bisect_left(entries, entry)
                if place < len(entries) and entries[place] == entry:
                    del entries[place]
        self._last.pop(parameter_set, None)

    def complete(self) -> None:
        """Record that a parameter set has run to its end."""
        self._any_complete = True

    def can_be_resumed(self, parameter_set: int, n_parameter_sets: int) -> bool:
        """Whether a later result can still let a paused parameter set be resumed.

        A rung never holds more than all parameter sets, so that at most n_parameter_sets // reduction_factor are in its
        top share at once. Where none is complete, the best paused one may be resumed whatever its place.

        Args:
            parameter_set: its number.
            n_parameter_sets: how many the study has in all.
        """
        rung, entry = self._last[parameter_set]
        if bisect_left(self.ranking[rung], entry) < n_parameter_sets // self.reduction_factor:
            return True
        return self.best_paused() == parameter_set

    def resumable(self, n_parameter_sets: int) -> list[int]:
        """The paused parameter sets that may still be resumed: the higher rung first, and the better ones of a rung."""
        found, best, top = list[int](), self.best_paused(), n_parameter_sets // self.reduction_factor
        for ranked, paused in zip(reversed(self.ranking), reversed(self._paused), strict=True):
            n_top = len(paused) if top >= len(ranked) else bisect_left(paused, ranked[top])
            found += [number for _, number in paused[:n_top]]
            if not n_top and paused and paused[0][1] == best:
                found.append(best)
        return found
