"""Scores by category: the time of a step with the best known options over its time now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_bge.advisor.audit.checks.row import Row, alarms

CATEGORIES = ("compute", "data", "memory", "loop", "search")


@dataclass(frozen=True)
class Score:
    """How near a category is to its best known state.

    Attributes:
        category: compute, data, memory, loop or search.
        score: time with the best known options over the time now, 0 to 1.
        now_ms: milliseconds of a batch now; of a search: 100, which stands for its training without pruning.
        best_ms: with all improvements of the category.
        why: which improvements those are.
    """

    category: str
    score: float
    now_ms: float
    best_ms: float
    why: str


def scores(rows: Sequence[Row], now_ms: float) -> list[Score]:
    """A score for each category with rows that apply.

    Args:
        rows: of the audit.
        now_ms: milliseconds of a batch.
    """
    found = []
    for category in CATEGORIES:
        members = [row for row in rows if row.group == category]
        if all(row.verdict in ("not applicable", "unknown") for row in members):
            continue
        savings = {row.name: row.time_saved.mid for row in alarms(members) if row.time_saved and row.time_saved.mid > 0}
        left = math.prod(1 - saving for saving in savings.values())
        unmeasured = [row.name for row in members if row.verdict == "mismatch" and row.name not in savings]
        names = [*savings, *(f"{name} (its saving is not known)" for name in unmeasured)]
        whole = 100.0 if category == "search" else now_ms
        why = ", ".join(names) or "no measured option would save more"
        found.append(Score(category, left, whole, whole * left, why))
    return found
