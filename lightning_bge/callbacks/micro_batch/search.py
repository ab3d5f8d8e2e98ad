"""Which sizes of a batch to try, and which one to take: arithmetic on what was measured."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)

LEAP = 8  # a line through measured sizes is not trusted beyond so many times the largest of them
CLOSE = 1.05  # the search ends where the smallest size that failed is no more than this above the largest that fitted
STEP = 0.045  # first step away from a size that failed or fitted against the prediction; it doubles, and is < CLOSE
ABOVE = 4  # no more than so many times what such a limit is predicted to allow is tried, should it raise no error
LONG = 2.0  # seconds; what disturbs the first step of a size is small against a step that takes longer
ROOMY = 0.5  # of the room: what the holes between blocks on a heap took, at the most that was seen
FAR = 0.8  # a predicted peak below this share of a limit that may be tried is believed without a try


@dataclass(frozen=True)
class Try:
    """What a size took.

    Attributes:
        units: the size.
        peak: bytes at the peak, above what was held before the step.
        seconds: of the training step.
    """

    units: int
    peak: int
    seconds: float


@dataclass(frozen=True)
class Room:
    """Bytes above what is held between steps.

    Attributes:
        hard: an allocation beyond it fails without harm, so that it can be tried. None: no such limit.
        soft: beyond it the process is killed or harmed, or others suffer: it must not be tried. None: no such limit.
    """

    hard: int | None
    soft: int | None


@dataclass(frozen=True)
class Answer:
    """A size and why; 0 units where not even one fits."""

    units: int
    reason: str


class Search:
    """Finds the size to train with, in units of the batch source.

    Memory is taken to be a line in the size: gradients and the like, and activations. `margin` is the share of the
    activations that is left free. What a limit that may be tried allows is found by tries, as allocators fragment; what
    another limit allows is predicted, and the largest size tried there leaves the margin already.

    Args:
        attempt: tries a size, with a validation batch or without; None: out of memory.
        measure_room: how much memory there is now; a step may leave caches behind.
        margin: share of the activations' memory to leave free, 0 to below 1.
        min_speedup: stop where twice the size brings less than this share more units a second. None: memory decides.
        default: speed is not measured below so many units.
        step: what a unit is called by: the reason speaks of `units * step`.
        noise: bytes by which a peak may be measured wrongly; where nothing must go wrong, it is added.

    Attributes:
        tried: all tries, failed ones with a peak of None.
    """

    def __init__(
        self,
        attempt: Callable[[int, bool], Try | None],
        measure_room: Callable[[], Room],
        margin: float,
        min_speedup: float | None,
        default: int,
        step: int = 1,
        noise: int = 0,
    ) -> None:
        self.attempt, self.measure_room, self.margin, self.min_speedup = attempt, measure_room, margin, min_speedup
        self.room = measure_room()
        self.default, self.step, self.noise = max(default, 1), step, noise
        self.tried: list[tuple[int, int | None, float | None]] = []
        self._points: dict[int, Try] = {}
        self._fitted: set[int] = set()
        self._failed: int | None = None
        self._in_a_row = 0  # tries that failed, or that fitted against the prediction

    def run(self) -> Answer:
        """The largest size that pays and leaves the margin."""
        if not self._begin():
            return Answer(0, f"not even {self.step:,} fits")
        if self.min_speedup is None:
            return self._by_memory(self._largest(None))
        answer = self._by_speed(self.min_speedup, 1.0)
        assert answer is not None
        return answer

    def run_where_roomy(self) -> Answer | None:
        """Likewise by speed alone; None as soon as a size with its margin takes more than half of the room."""
        if self.min_speedup is None or not self._begin():
            return None
        return self._by_speed(self.min_speedup, ROOMY)

    def _begin(self) -> bool:
        """Try the two smallest sizes, for a line through them; False: nothing fits."""
        if self._try(1) and self._predict(2) + self.noise <= (math.inf if self.room.soft is None else self.room.soft):
            self._try(2)
        return bool(self._fitted)

    def peak(self, units: int) -> int:
        """Bytes that a size takes, as measured or predicted."""
        found = self._points.get(units)
        return max(0, round(self._predict(units))) if found is None else found.peak

    # ------------------------------------------------------------------ speed

    def _by_speed(self, min_speedup: float, share: float) -> Answer | None:
        """Double the size as long as that brings enough; None: it takes more than a share of the room."""
        units, before = max(self.default // 2, 1), None
        while True:
            if share < 1 and (self._failed is not None or not self._takes(units, share)):
                return None
            found = self._largest(units)
            if found < units:
                return self._by_memory(found)
            rate = self._rate(units)
            if rate is None:
                continue  # it does not fit after all
            gain = math.inf if before is None else rate / before - 1
            if gain < min_speedup and units >= self.default:
                taken = max(units // 2, self.default)
                return Answer(taken, f"{units * self.step:,} brought {gain:+.0%} units a second over half of it")
            before, units = rate, self.default if units < self.default else 2 * units

    def _rate(self, units: int) -> float | None:
        """Units a second, the better of two steps unless they are long; None: it does not fit."""
        if units not in self._fitted and not self._try(units):
            return None
        if self._points[units].seconds > LONG:
            return units / self._points[units].seconds
        again = self.attempt(units, False)
        if again is None:
            self._drop(units)
            return None
        return units / max(min(self._points[units].seconds, again.seconds), 1e-9)

    # ------------------------------------------------------------------ memory

    def _by_memory(self, units: int) -> Answer:
        """Confirm the size by a real try."""
        while units > 1 and units not in self._fitted and not self._try(units):
            units = max(1, min(units - 1, int(units * 0.95)))
        reason = f"the largest that fitted is {self._low * self.step:,}, and {self.margin:.0%} of its activations"
        if self._failed is None:
            reason = f"as much as the limit is predicted to allow, less {self.margin:.0%} of the activations"
        return Answer(units, reason if self._failed is None else f"{reason} are left free")

    def _largest(self, cap: int | None) -> int:
        """The largest size up to `cap` that leaves the margin; tries what has to be tried."""
        while (units := self._next(cap)) is not None:
            self._try(units)
        top = self._top(cap)
        reached = self._low if top is None else min(self._low, top)
        if self._failed is None and (self.room.hard is None or self._is_far(reached)):
            return max(reached, 1)
        return max(min(reached, int(self._low * (1 - self.margin) + 1e-9)), 1)

    def _next(self, cap: int | None) -> int | None:
        """The size to try next; None: enough is known."""
        low, high, top = self._low, self._failed, self._top(cap)
        need = top
        if need is not None and self.room.hard is not None and need == cap and not self._is_far(need):
            need = math.ceil(need / (1 - self.margin) - 1e-9)
            soft = self._allowed(self.room.soft, self.noise)
            need = need if soft is None else min(need, max(int(soft), 1))
        if need is not None and (low >= need or (top != cap and low * CLOSE >= need)):
            return None
        if high is None:
            aim = self._allowed(self.room.hard)
            if aim is not None and low > ABOVE * aim:
                return None
            units = max(int(aim) if aim is not None else LEAP * low, math.ceil(low * (1 + STEP * 2**self._in_a_row)))
            units = max(min(units, LEAP * low), low + 1)
            return units if need is None else min(units, need)
        if high - low <= 1 or high <= CLOSE * low:
            return None
        units = max((low + high) // 2, int(high * (1 - STEP * 2 ** (self._in_a_row - 1))) if self._in_a_row else 0)
        units = min(max(units, low + 1), high - 1)
        return units if need is None else min(units, need)

    def _top(self, cap: int | None) -> int | None:
        """The largest size worth a try: no more than `cap`, and than leaves the margin under a limit that kills."""
        soft = self._allowed(self.room.soft, self.noise)
        if soft is None:
            return cap
        most = max(int(soft * (1 - self.margin)), 1)
        return most if cap is None else min(most, cap)

    def _is_far(self, units: int) -> bool:
        """Whether a size with its margin is far below the limit that raises."""
        return self._failed is None and self._takes(units, FAR, soft=False)

    def _takes(self, units: int, share: float, soft: bool = True) -> bool:
        """Whether a size with its margin is predicted to take no more than a share of the room."""
        rooms = [self.room.hard, self.room.soft if soft else None]
        peak = self._predict(units / (1 - self.margin))
        return all(room is None or peak <= share * room for room in rooms)

    # ------------------------------------------------------------------ what is known

    @property
    def _low(self) -> int:
        """The largest size that fitted."""
        return max(self._fitted, default=0)

    def _try(self, units: int) -> bool:
        foreseen = bool(self._points) and self.room.hard is not None and self._predict(units) <= self.room.hard
        soft = self.room.soft
        found = self.attempt(units, True)
        self.room = self.measure_room()
        log.debug("%d units: %s", units, found)
        if found is not None:
            self._points[units] = found
        self.tried.append((units, None if found is None else found.peak, None if found is None else found.seconds))
        if found is None or (soft is not None and found.peak > soft):
            self._drop(units)
            return False
        self._fitted.add(units)
        self._in_a_row = 0 if foreseen or self._failed is not None else self._in_a_row + 1
        return True

    def _drop(self, units: int) -> None:
        """A size failed: larger ones would, too."""
        self._in_a_row = 1 if self._failed is None else self._in_a_row + 1
        self._failed = units if self._failed is None else min(units, self._failed)
        self._fitted = {fitted for fitted in self._fitted if fitted < units}

    def _line(self, noise: int = 0) -> tuple[Try, float]:
        """The largest size measured, and bytes of a further unit: seen from one of at most half its size."""
        last = self._points[max(self._points)]
        earlier = max((units for units in self._points if 2 * units <= last.units), default=0)
        held = self._points[earlier].peak if earlier else 0
        slope = (last.peak - held + noise) / (last.units - earlier)
        return last, max(slope if slope > 0 else last.peak / last.units, 1.0)

    def _predict(self, units: float) -> float:
        last, slope = self._line()
        return last.peak + slope * (units - last.units)

    def _allowed(self, room: int | None, noise: int = 0) -> float | None:
        """The size whose predicted peak fills so many bytes, 0 or more."""
        if room is None:
            return None
        last, slope = self._line(noise)
        return max(last.units + (room - last.peak - noise) / slope, 0.0)
