"""The short answer: where a step's time goes, how far that is from the best known setting, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lightning_bge.advisor.audit.checks_compute import Case, Row
from lightning_bge.advisor.audit.checks_data import host_seconds
from lightning_bge.advisor.audit.observe import FETCH, MOVE, RUN
from lightning_bge.advisor.audit.trace import PARTS

WORTH = 0.02  # share of a step's time below which nothing is worth doing
CATEGORIES = ("compute", "data", "memory", "loop", "search")


@dataclass(frozen=True)
class Score:
    """How near a category is to the best that is known of it.

    Attributes:
        category: compute, data, memory, loop or search.
        score: time at the best setting known over the time now, 0 to 1.
        now_ms: milliseconds of a batch now; of a search 100 stands for its training without pruning.
        best_ms: with all of the category's rows that are off switched on.
        why: which rows those are.
    """

    category: str
    score: float
    now_ms: float
    best_ms: float
    why: str


def scores(rows: Sequence[Row], now_ms: float) -> list[Score]:
    """A score for each category that has rows.

    Args:
        rows: of the audit.
        now_ms: milliseconds of a batch.
    """
    found = []
    for category in CATEGORIES:
        own = [row for row in rows if row.group == category]
        open_ = [row for row in own if row.verdict in ("lie", "off") and row.gain is not None and row.gain.mid > 0]
        if not any(row.verdict not in ("not applicable", "unknown") for row in own):
            continue
        left = 1.0
        for row in open_:
            assert row.gain is not None
            left *= 1 - row.gain.mid
        whole = 100.0 if category == "search" else now_ms
        lies = [row.name for row in own if row.verdict == "lie" and row not in open_]
        names = [row.name for row in open_] + [f"{name} (its gain is not known)" for name in lies]
        why = ", ".join(names) or "nothing measured here would bring more"
        found.append(Score(category, left, whole, whole * left, why))
    return found


def step_parts(case: Case) -> dict[str, float]:
    """Milliseconds of a batch: computing by kind, the host within a step, data, and what runs between the batches."""
    seen = case.seen
    if seen.trace is None or not seen.timed:
        return {}
    batches = max(seen.batches_per_step, 1)
    inside = seen.seconds(RUN)
    busy = {part: seen.trace.parts[part] / batches for part in PARTS if part != "host"}
    idle = min(median(host_seconds(case)), inside)
    # the trace slows operations down: they are scaled to what they can take in a step without one
    scale = min(1.0, (inside - idle) / sum(busy.values())) if sum(busy.values()) else 1.0
    data = seen.seconds(FETCH, MOVE)
    between = max(0.0, seen.cycle_seconds - inside - data)
    parts = {part: seconds * scale for part, seconds in busy.items()}
    parts |= {"host": idle, "waiting for data": data, "callbacks and loop": between}
    return {part: seconds * 1e3 for part, seconds in parts.items()}


def peak_share(case: Case) -> dict[str, Any]:
    """The step's matrix products a second, against the fastest big one on this machine in the same dtype."""
    trace = case.seen.trace
    peak = case.seen.peak
    if trace is None or peak is None or not case.seen.cycle_seconds:
        return {}
    seconds = case.seen.cycle_seconds * max(case.seen.batches_per_step, 1)
    achieved = sum(trace.flops.values()) / seconds
    return {
        "dtype": trace.dtype,
        "peak_gflops": peak / 1e9,
        "achieved_gflops": achieved / 1e9,
        "share": achieved / peak,
    }


def next_step(rows: Sequence[Row], parts: dict[str, float]) -> str:
    """One sentence: what to do next, what it brings, how sure that is."""
    wrong = [row for row in rows if row.verdict in ("lie", "off")]
    known = [row for row in wrong if row.gain is not None and row.gain.mid > WORTH]
    steps = [row for row in known if row.group != "search"]
    best = max(steps or known, key=lambda row: row.gain.mid if row.gain else 0.0, default=None)
    lies = [row for row in wrong if row.verdict == "lie"]
    if best is None and lies:
        return f"First mend what is not what it seems: {lies[0].name} ({lies[0].evidence}); {lies[0].advice}."
    if best is None:
        most = max(parts, key=lambda part: parts[part], default="nothing")
        whole = sum(parts.values()) or 1.0
        return (
            f"Maxed out as far as was measured: nothing here brings more than {WORTH:.0%} of a step; most of its time "
            f"goes into {most} ({parts.get(most, 0.0) / whole:.0%})."
        )
    assert best.gain is not None
    of = "the search's training" if best.group == "search" else "a step's time"
    line = f" ({best.yaml})" if best.yaml else ""
    return (
        f"Next: {best.name}: {best.advice}{line}; it brings {best.gain.mid:.0%} of {of} "
        f"({best.gain.low:.0%} to {best.gain.high:.0%}, {best.gain.kind})."
    )
