"""Shares of a batch's time, and what a batch would save without them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low

import numpy as np

from lightning_bge.advisor.audit.checks.row import ObservedRun, TimeSaved
from lightning_bge.advisor.audit.trace.step_trace import HOST

NOTICEABLE_SHARE = 0.05  # of a batch's time that is worth a change
NOTICEABLE_SECONDS = 0.002  # at least: Lightning's own loop takes half a millisecond


def milliseconds(seconds: Sequence[float]) -> str:
    """The median, as text."""
    return f"{median_low(seconds) * 1e3:.1f} ms"


def share_of_batch(run: ObservedRun, seconds: Sequence[float]) -> float:
    """The median as a share of the time from one batch to the next."""
    whole = run.seen.cycle_seconds
    return median_low(seconds) / whole if whole else 0.0


def is_noticeable(run: ObservedRun, share: float) -> bool:
    """Whether a share of a batch's time is worth a change."""
    return share >= NOTICEABLE_SHARE and share * run.seen.cycle_seconds >= NOTICEABLE_SECONDS


def saved_without(run: ObservedRun, seconds: Sequence[float], condition: str) -> TimeSaved:
    """What a batch would save without these seconds, with the first and the last decile as interval."""
    whole = run.seen.cycle_seconds
    low, mid, high = (float(np.quantile(seconds, q)) / whole for q in (0.1, 0.5, 0.9))
    text = f"{mid * whole * 1e3:.0f} ms of {whole * 1e3:.0f} ms a batch, {condition}"
    return TimeSaved(low, mid, high, "measured", text)


def host_seconds(run: ObservedRun) -> list[float]:
    """For each traced step, seconds of a batch's forward, backward and step in which no operation ran."""
    return [trace.parts[HOST] / run.seen.batches_per_step for trace in run.seen.traces]
