"""Checks of memory: the peak against the tightest limit."""

from __future__ import annotations

from dataclasses import replace

from lightning_bge.advisor.audit.checks.row import NOT_STATED, Fix, ObservedRun, Row
from lightning_bge.runtime.memory import format_bytes, limits

NEAR_LIMIT = 0.95  # of the memory: the next longer batch may not fit


def memory_rows(run: ObservedRun) -> list[Row]:
    """Peak memory."""
    return [peak_memory(run)]


def peak_memory(run: ObservedRun) -> Row:
    """The most memory that was held, against the tightest limit."""
    known = limits(run.device if run.device.type == "cuda" else None)
    peak = run.seen.device.peak_bytes
    row = Row("memory", "peak memory", NOT_STATED, format_bytes(peak), "ok", "")
    if not known or not peak:
        return replace(row, verdict="unknown", evidence="no limit on memory is known")
    limit = known[0]
    share = peak / limit.total
    row = replace(row, evidence=f"{share:.0%} of {format_bytes(limit.total)} ({limit.name})")
    if share < NEAR_LIMIT:
        return row
    return replace(
        row,
        verdict="improve",
        fix=Fix("use smaller micro-batches before an out-of-memory error occurs", "one number", "none"),
    )
