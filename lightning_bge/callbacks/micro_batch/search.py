"""Which sizes of a batch to try, and which one to take: arithmetic on what was measured."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)

MAX_EXTRAPOLATION = 8  # a line through measured sizes is used up to so many times the largest of them
CLOSE = 1.05  # the search ends where the smallest size that failed is no more than this above the largest that fitted
FIRST_STEP = 0.045  # from a size that failed or fitted against the prediction; it doubles, and is below CLOSE
MAX_ABOVE = 4  # up to so many times what a limit is predicted to allow is tried, should it raise no error
LONG_S = 2.0  # what disturbs the first step of a size is small compared with a step that takes longer
PLENTY = 0.5  # of the free memory: holes between blocks on the heap took up to the other half
FAR_BELOW = 0.8  # a predicted peak below this share of a limit that raises an error needs no trial step


@dataclass(frozen=True)
class TrialStep:
    """What a step of one size took.

    Attributes:
        units: the size.
        peak: bytes at the peak, above what was held before the step.
        seconds: of the training step.
    """

    units: int
    peak: int
    seconds: float


@dataclass(frozen=True)
class FreeMemory:
    """Bytes above what is held between steps, under two kinds of limits.

    Attributes:
        raising: an allocation beyond it raises an error without harm, so that it can be tried. None: no such limit.
        killing: beyond it the process is killed or other processes suffer: it must not be tried. None: no such limit.
    """

    raising: int | None
    killing: int | None


@dataclass(frozen=True)
class Answer:
    """A size and why; 0 units where not even one fits."""

    units: int
    reason: str


class Search:
    """Finds the size to train with, in units of the batch source.

    The peak is modelled as a line in the size: a constant part such as gradients, and activations. `margin` is the
    share of the activations that is left free. What fits under a limit that raises is found by trial steps, as
    allocators fragment; what fits under a limit that kills is predicted, and the largest size tried there leaves the
    margin.

    Args:
        attempt: makes a trial step of a size, with a validation batch or without; None: out of memory.
        measure_free: how much memory is free now; a step may leave caches behind.
        margin: share of the activations' memory to leave free, 0 to below 1.
        min_speedup: stop where twice the size brings less than this share more units a second. None: memory decides.
        default: speed is not measured below so many units.
        step: the size of a unit: the reason names `units * step`.
        noise: bytes by which a measured peak may be wrong; it is added under a limit that kills.

    Attributes:
        tried: all trial steps, failed ones with a peak of None.
    """

    def __init__(
        self,
        attempt: Callable[[int, bool], TrialStep | None],
        measure_free: Callable[[], FreeMemory],
        margin: float,
        min_speedup: float | None,
        default: int,
        step: int = 1,
        noise: int = 0,
    ) -> None:
        self.attempt, self.measure_free, self.margin, self.min_speedup = attempt, measure_free, margin, min_speedup
        self.free = measure_free()
        self.default, self.step, self.noise = max(default, 1), step, noise
        self.tried: list[tuple[int, int | None, float | None]] = []
        self._measured: dict[int, TrialStep] = {}
        self._fitted: set[int] = set()
        self._failed: int | None = None
        self._in_a_row = 0  # steps that failed, or that fitted against the prediction

    def run(self) -> Answer:
        """The largest size that pays and leaves the margin."""
        if not self._begin():
            return Answer(0, f"not even {self.step:,} fits")
        if self.min_speedup is None:
            return self._by_memory(self._largest(None))
        answer = self._by_speed(self.min_speedup, 1.0)
        assert answer is not None
        return answer

    def run_if_plenty(self) -> Answer | None:
        """The size by speed alone; None as soon as a size with its margin takes more than half of the free memory."""
        if self.min_speedup is None or not self._begin():
            return None
        return self._by_speed(self.min_speedup, PLENTY)

    def _begin(self) -> bool:
        """Try the two smallest sizes, for a line through them; False: nothing fits."""
        killing = math.inf if self.free.killing is None else self.free.killing
        if self._try(1) and self._predict(2) + self.noise <= killing:
            self._try(2)
        return bool(self._fitted)

    def peak(self, units: int) -> int:
        """Bytes that a size takes, as measured or predicted."""
        found = self._measured.get(units)
        return max(0, round(self._predict(units))) if found is None else found.peak

    # ------------------------------------------------------------------ speed

    def _by_speed(self, min_speedup: float, share: float) -> Answer | None:
        """Double the size as long as that speeds up enough; None: it takes more than a share of the free memory."""
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
        if self._measured[units].seconds > LONG_S:
            return units / self._measured[units].seconds
        second = self.attempt(units, False)
        if second is None:
            self._drop(units)
            return None
        return units / max(min(self._measured[units].seconds, second.seconds), 1e-9)

    # ------------------------------------------------------------------ memory

    def _by_memory(self, units: int) -> Answer:
        """Confirm the size by a trial step."""
        while units > 1 and units not in self._fitted and not self._try(units):
            units = max(1, min(units - 1, int(units * 0.95)))
        reason = f"the largest that fitted is {self._low * self.step:,}, and {self.margin:.0%} of its activations"
        if self._failed is None:
            reason = f"as much as the limit is predicted to allow, less {self.margin:.0%} of the activations"
        return Answer(units, reason if self._failed is None else f"{reason} are left free")

    def _largest(self, cap: int | None) -> int:
        """The largest size up to `cap` that leaves the margin; makes the trial steps that this needs."""
        while (units := self._next(cap)) is not None:
            self._try(units)
        top = self._top(cap)
        reached = self._low if top is None else min(self._low, top)
        if self._failed is None and (self.free.raising is None or self._is_far(reached)):
            return max(reached, 1)
        return max(min(reached, int(self._low * (1 - self.margin) + 1e-9)), 1)

    def _next(self, cap: int | None) -> int | None:
        """The size to try next; None: enough is known."""
        low, high, need = self._low, self._failed, self._needed(cap)
        if need is not None and (low >= need or (self._top(cap) != cap and low * CLOSE >= need)):
            return None
        units = self._above(low) if high is None else self._between(low, high)
        return units if units is None or need is None else min(units, need)

    def _needed(self, cap: int | None) -> int | None:
        """The size that has to fit, so that the largest one up to `cap` leaves its margin; None: there is no cap."""
        top = self._top(cap)
        if top is None or self.free.raising is None or top != cap or self._is_far(top):
            return top
        need = math.ceil(top / (1 - self.margin) - 1e-9)
        most = self._allowed(self.free.killing, self.noise)
        return need if most is None else min(need, max(int(most), 1))

    def _above(self, low: int) -> int | None:
        """A larger size, where none has failed; None: far more fits than was predicted."""
        aim = self._allowed(self.free.raising)
        if aim is not None and low > MAX_ABOVE * aim:
            return None
        step = math.ceil(low * (1 + FIRST_STEP * 2**self._in_a_row))
        units = max(MAX_EXTRAPOLATION * low if aim is None else int(aim), step)
        return max(min(units, MAX_EXTRAPOLATION * low), low + 1)

    def _between(self, low: int, high: int) -> int | None:
        """A size between one that fitted and one that failed; None: they are close to each other."""
        if high - low <= 1 or high <= CLOSE * low:
            return None
        step = int(high * (1 - FIRST_STEP * 2 ** (self._in_a_row - 1))) if self._in_a_row else 0
        return min(max((low + high) // 2, step, low + 1), high - 1)

    def _top(self, cap: int | None) -> int | None:
        """The largest size that may be tried: up to `cap`, and with the margin under a limit that kills."""
        allowed = self._allowed(self.free.killing, self.noise)
        if allowed is None:
            return cap
        most = max(int(allowed * (1 - self.margin)), 1)
        return most if cap is None else min(most, cap)

    def _is_far(self, units: int) -> bool:
        """Whether a size with its margin is far below the limit that raises."""
        return self._failed is None and self._takes(units, FAR_BELOW, killing=False)

    def _takes(self, units: int, share: float, killing: bool = True) -> bool:
        """Whether a size with its margin is predicted to take no more than a share of the free memory."""
        limits = [self.free.raising, self.free.killing if killing else None]
        peak = self._predict(units / (1 - self.margin))
        return all(limit is None or peak <= share * limit for limit in limits)

    # ------------------------------------------------------------------ what is known

    @property
    def _low(self) -> int:
        """The largest size that fitted."""
        return max(self._fitted, default=0)

    def _try(self, units: int) -> bool:
        predicted = bool(self._measured) and self.free.raising is not None and self._predict(units) <= self.free.raising
        killing = self.free.killing
        found = self.attempt(units, True)
        self.free = self.measure_free()
        log.debug("%d units: %s", units, found)
        if found is not None:
            self._measured[units] = found
        self.tried.append((units, None if found is None else found.peak, None if found is None else found.seconds))
        if found is None or (killing is not None and found.peak > killing):
            self._drop(units)
            return False
        self._fitted.add(units)
        self._in_a_row = 0 if predicted or self._failed is not None else self._in_a_row + 1
        return True

    def _drop(self, units: int) -> None:
        """Note a size that failed: larger ones would fail too."""
        self._in_a_row = 1 if self._failed is None else self._in_a_row + 1
        self._failed = units if self._failed is None else min(units, self._failed)
        self._fitted = {fitted for fitted in self._fitted if fitted < units}

    def _line(self, noise: int = 0) -> tuple[TrialStep, float]:
        """The largest size measured, and bytes of a further unit, by a size of at most half of it."""
        last = self._measured[max(self._measured)]
        earlier = max((units for units in self._measured if 2 * units <= last.units), default=0)
        held = self._measured[earlier].peak if earlier else 0
        slope = (last.peak - held + noise) / (last.units - earlier)
        return last, max(slope if slope > 0 else last.peak / last.units, 1.0)

    def _predict(self, units: float) -> float:
        last, slope = self._line()
        return last.peak + slope * (units - last.units)

    def _allowed(self, free: int | None, noise: int = 0) -> float | None:
        """The size whose predicted peak fills so many bytes, 0 or more."""
        if free is None:
            return None
        last, slope = self._line(noise)
        return max(last.units + (free - last.peak - noise) / slope, 0.0)
