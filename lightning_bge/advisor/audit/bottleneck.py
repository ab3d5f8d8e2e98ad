"""Names the next bottleneck: where a step's time goes, how far that is from the hardware's peak, what to do next."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from lightning_bge.advisor.audit.checks_loop import host_seconds
from lightning_bge.advisor.audit.observation import FETCH, HOST, MOVE, PARTS, RUN
from lightning_bge.advisor.audit.requested import ObservedRun
from lightning_bge.advisor.audit.result import Row

MIN_SAVING = 0.02  # share of a step's time below which no change is recommended
UNKNOWN = "see its evidence"


def step_parts(run: ObservedRun) -> dict[str, float]:
    """Milliseconds of a batch: computing by kind, the host within a step, data, and what runs between the batches."""
    seen = run.seen
    if seen.trace is None or not seen.timed:
        return {}
    inside, data = seen.seconds(RUN), seen.seconds(FETCH, MOVE)
    busy = {part: seen.trace.parts[part] / seen.batches_per_step for part in PARTS if part != HOST}
    idle = min(median(host_seconds(run)), inside)
    # the trace slows operations down: they are scaled to the time that they can take in a step without one
    scale = min(1.0, (inside - idle) / sum(busy.values())) if sum(busy.values()) else 1.0
    parts = {part: seconds * scale for part, seconds in busy.items()}
    parts |= {HOST: idle, "data wait": data, "callbacks and loop": max(0.0, seen.cycle_seconds - inside - data)}
    return {part: seconds * 1e3 for part, seconds in parts.items()}


def peak_share(run: ObservedRun) -> dict[str, Any]:
    """FLOP/s of the step's matrix products against the fastest big product on this machine in the same dtype."""
    trace, peak = run.seen.trace, run.seen.device.peak_flops
    if trace is None or peak is None or not run.seen.cycle_seconds:
        return {}
    achieved = trace.flops.total() / (run.seen.cycle_seconds * run.seen.batches_per_step)
    return {
        "dtype": trace.dtype,
        "peak_gflops": peak / 1e9,
        "achieved_gflops": achieved / 1e9,
        "share": achieved / peak,
    }


def next_step(rows: Sequence[Row], parts: Mapping[str, float], peak: Mapping[str, Any]) -> str:
    """One sentence: what to do next, what it saves, how certain that is.

    Args:
        rows: of the audit.
        parts: milliseconds of a batch by what they are spent on.
        peak: `peak_share` of the run.
    """
    known = [row for row in rows if row.alarm and row.time_saved is not None and row.time_saved.mid > MIN_SAVING]
    in_steps = [row for row in known if row.group != "search"]
    best = max(in_steps or known, key=lambda row: row.time_saved.mid if row.time_saved else 0.0, default=None)
    if best is not None and best.time_saved is not None:
        of, saved = "the search's training" if best.group == "search" else "a step's time", best.time_saved
        return (
            f"Next: {best.name}: {best.fix or UNKNOWN}. This saves {saved.mid:.0%} of {of} "
            f"({saved.low:.0%} to {saved.high:.0%}, {saved.kind})."
        )
    mismatch = next((row for row in rows if row.verdict == "mismatch"), None)
    if mismatch is not None:
        return f"Next: {mismatch.name} is not in effect as requested ({mismatch.evidence}): {mismatch.fix or UNKNOWN}."
    most = max(parts, key=lambda part: parts[part], default="nothing")
    share = parts.get(most, 0.0) / (sum(parts.values()) or 1.0)
    text = f"No measured option saves more than {MIN_SAVING:.0%} of a step's time. "
    if not any(row.time_saved is not None and row.time_saved.kind == "measured" for row in rows):
        text = "The observed steps show nothing to improve; no option was switched on and off. "
    text += f"Most of it is spent on {most} ({share:.0%})"
    if peak:
        text += f"; matrix products reach {peak['share']:.0%} of this machine's peak in {peak['dtype']}"
    return f"{text}."
