"""Figures of a replayed search: how soon it finds the best value, and how far it stays from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_bge.hpo.forecast.recording import Recording
from lightning_bge.hpo.forecast.replay import Replay


def oracle(recording: Recording, order: Sequence[int], name: str = "") -> Replay:
    """Replay a search that knows each trial's final value before its start, and runs only those that become the best.

    No pruner can do that: it shows how far the best pruner is from what is possible.
    """
    sign = recording.sign
    clock, best, found, steps = 0.0, -math.inf, [], []
    for place in order:
        curve = recording.trials[place]
        improves = curve.value is not None and sign * curve.value > best
        steps.append(len(curve.values) if improves else 0)
        if improves:
            assert curve.value is not None
            clock, best = clock + math.fsum(curve.seconds), sign * curve.value
            found.append((clock, curve.value))
    return Replay(clock, tuple(found), tuple(steps), tuple(order))


def regret(recording: Recording, run: Replay, seconds: float) -> float:
    """How far the best value found in so many seconds is from the best of all, as a share of the best.

    1 before any trial has run to its end.
    """
    values = [value for at, value in run.found if at <= seconds]
    if not values:
        return 1.0
    best = max(values) if recording.direction == "maximize" else min(values)
    return min(1.0, abs(best - recording.best) / abs(recording.best))


def mean_regret(recording: Recording, run: Replay) -> float:
    """The mean regret over the time that the search takes without pruning: one number for its speed and its end."""
    full, sign = recording.full_seconds, recording.sign
    total, since, now, best = 0.0, 0.0, 1.0, -math.inf
    for at, value in run.found:
        if sign * value > best:
            best = sign * value
            total += now * (min(at, full) - since)
            since, now = min(at, full), min(1.0, abs(value - recording.best) / abs(recording.best))
    return (total + now * (full - since)) / full


def share_to_reach(recording: Recording, run: Replay, within: float = 0.01) -> float | None:
    """The time until the best value was found, as a share of the time without pruning; None: it was not found.

    Args:
        recording: what was replayed.
        run: the replay.
        within: the largest difference from the best value that counts, as a share of the best value.
    """
    room = within * abs(recording.best)
    return next((at / recording.full_seconds for at, value in run.found if abs(value - recording.best) <= room), None)
