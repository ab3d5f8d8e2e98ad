"""Which sizes of a batch to try, and which one to take: arithmetic on what was measured."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)

MAX_EXTRAPOLATION = 8  # a line through measured sizes is used up to so many times the largest of them
CLOSE = 1.05  # the search ends where the smallest size that failed is no more than this above the largest that fitted
SHORT_S, CONFIRM = 0.5, 3  # steps up to so long are made so many times more before a size is said not to pay
LONG_S = 2.0  # what disturbs the first step of a size is small compared with a step that takes longer
MAX_UNITS = 2**30  # should nothing ever fail, as with batches that do not grow with the size


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
class Answer:
    """A size and why; 0 units where not even one fits.

    Attributes:
        units: the size.
        reason: why, in one line.
        peak: bytes that a step takes above what is held before it, as measured or predicted.
    """

    units: int
    reason: str
    peak: int = 0


class Search:
    """Finds the size to train with, in units of the batch source: doubling, then bisection.

    The size is doubled until memory ends or speed does. Where a trial step failed, the size is then bisected
    geometrically between the largest that fitted and the smallest that failed. Where a limit must not be tried, no step
    is made whose peak, with the margin, is predicted to exceed it: the peak is modelled as a line in the size, a
    constant part such as gradients and the activations.

    Args:
        attempt: makes a trial step of a size, with a validation batch or without; None: out of memory.
        measure_free: bytes that a step may take; beyond them the process is killed or other processes suffer. It is
            asked after each step, which may leave caches behind. None: sizes are tried until an allocation fails.
        margin: share of the activations' memory to leave free, 0 to below 1.
        min_speedup: stop where twice the size brings less than this share more units a second. None: memory decides.
        default: speed is not measured below so many units.
        step: the size of a unit: the reason names `units * step`.
        noise: bytes by which a measured peak may be wrong; it is added where a limit must not be tried.
        largest: units beyond which nothing is of use.
        shortest_s: speed is not measured where a step takes fewer seconds.

    Attributes:
        tried: (units, peak, seconds) of all trial steps; peak and seconds are None where it failed.
    """

    def __init__(
        self,
        attempt: Callable[[int, bool], TrialStep | None],
        measure_free: Callable[[], int | None],
        *,
        margin: float,
        min_speedup: float | None,
        default: int,
        step: int = 1,
        noise: int = 0,
        largest: int = MAX_UNITS,
        shortest_s: float = 0.0,
    ) -> None:
        self.attempt, self.measure_free, self.margin, self.min_speedup = attempt, measure_free, margin, min_speedup
        self.default, self.step, self.noise = max(default, 1), step, noise
        self.largest, self.shortest_s = largest, shortest_s
        self.free = measure_free()
        self.tried: list[tuple[int, int | None, float | None]] = []
        self._fitted: dict[int, TrialStep] = {}
        self._failed: int | None = None
        self._seconds: dict[int, float] = {}  # the shortest time of each size that fitted

    def run(self) -> Answer:
        """The largest size that pays and leaves the margin."""
        units: int | None = 1
        before: int | None = None
        while units is not None:
            if self._try(units) and self.min_speedup is not None and self._is_timed(units):
                if before is not None and units == 2 * before and not self._pays(before, units):
                    gain = f"{units * self.step:,} brought {self._gain(before, units):+.0%} units a second"
                    return self.answer(min(before, self._with_margin(units)), f"{gain} over half of it")
                before = units
            units = self._next()
        low = self._low
        if low == 0:
            return Answer(0, f"not even {self.step:,} fits")
        if self._failed is None and low >= self.largest:
            return self.answer(low, f"nothing larger than {low * self.step:,} is of use")
        if self._failed is None:
            reason = f"as much as the limit is predicted to allow, less {self.margin:.0%} of the activations"
            return self.answer(low, reason)
        reason = f"the largest that fitted is {low * self.step:,}, and {self.margin:.0%} of its activations"
        return self.answer(self._with_margin(low), f"{reason} are left free")

    def _is_timed(self, units: int) -> bool:
        """Whether the speed of a size counts that has just fitted; a short step is made a second time."""
        if self._failed is not None or units < self.default:
            return False
        if self._seconds[units] <= LONG_S and not self._time(units):
            return False
        return self._seconds[units] >= self.shortest_s

    def _pays(self, half: int, units: int) -> bool:
        """Whether a size is faster than half of it; where it seems not to be, short steps of both are made again."""
        assert self.min_speedup is not None
        for _ in range(CONFIRM if self._seconds[units] <= SHORT_S else 0):
            if self._gain(half, units) >= self.min_speedup or not (self._time(half) and self._time(units)):
                break
        return units not in self._fitted or self._gain(half, units) >= self.min_speedup

    def largest_within(self, free: float, noise: int = 0) -> float:
        """Units whose step is predicted to take no more than `free` bytes; below 1 where none is."""
        last, slope = self._line(noise)
        return last.units + (free - last.peak - noise) / slope

    def within_margin(self, free: float) -> int:
        """Units whose step is predicted to leave the margin, although peaks may be wrong by `noise`."""
        return int(self.largest_within(free, self.noise) * (1 - self.margin))

    def _gain(self, half: int, units: int) -> float:
        return 2 * self._seconds[half] / max(self._seconds[units], 1e-9) - 1

    def _time(self, units: int) -> bool:
        """Make another step of a size, and note its time if it is the shortest; False: it does not fit after all."""
        again = self.attempt(units, False)
        if again is None:
            self._drop(units)
            return False
        self._seconds[units] = min(self._seconds[units], again.seconds)
        return True

    def answer(self, units: int, reason: str) -> Answer:
        """A size, why, and the bytes that its step takes, as measured or predicted."""
        known = self._fitted.get(units)
        return Answer(units, reason, max(0, round(self._predict(units))) if known is None else known.peak)

    # ------------------------------------------------------------------ sizes

    @property
    def _low(self) -> int:
        """The largest size that fitted."""
        return max(self._fitted, default=0)

    def _with_margin(self, units: int) -> int:
        return max(int(units * (1 - self.margin) + 1e-9), 1)

    def _next(self) -> int | None:
        """The size to try next; None: enough is known."""
        low, high = self._low, self._failed
        if high is not None:
            if high <= max(low + 1, CLOSE * low):
                return None
            units = max(math.isqrt(low * high), low + 1)
        elif low >= self.largest:
            return None
        else:  # the first two sizes give the line
            units = min(MAX_EXTRAPOLATION * low, self.default) if 2 <= low < self.default else 2 * low
            units = min(units, self.largest)
        if self.free is not None:
            most = self.within_margin(self.free)
            if most < units:
                return most if most > CLOSE * low else None
        return units

    # ------------------------------------------------------------------ what is known

    def _try(self, units: int) -> bool:
        free = self.free  # what the step leaves in its place is a part of its peak
        found = self.attempt(units, True)
        self.free = self.measure_free()
        log.debug("%d units: %s of %s bytes, %s afterwards", units, found, free, self.free)
        self.tried.append((units, None, None) if found is None else (units, found.peak, found.seconds))
        if found is None or (free is not None and found.peak > free):
            self._drop(units)
            return False
        self._fitted[units], self._seconds[units] = found, found.seconds
        return True

    def _drop(self, units: int) -> None:
        """Note a size that failed: larger ones would fail too."""
        self._failed = units if self._failed is None else min(units, self._failed)
        self._fitted = {size: step for size, step in self._fitted.items() if size < units}

    def _line(self, noise: int = 0) -> tuple[TrialStep, float]:
        """The largest size that fitted, and bytes of a further unit, by a size of at most half of it."""
        last = self._fitted[self._low]
        earlier = max((units for units in self._fitted if 2 * units <= last.units), default=0)
        held = self._fitted[earlier].peak if earlier else 0
        slope = (last.peak - held + noise) / (last.units - earlier)
        return last, max(slope if slope > 0 else last.peak / last.units, 1.0)

    def _predict(self, units: float) -> float:
        last, slope = self._line()
        return last.peak + slope * (units - last.units)
