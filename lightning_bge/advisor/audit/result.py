"""The result of an audit: its rows, its scores, and the options that say how much is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lightning_bge.errors import ConfigError

AUDIT_SCHEMA = 2  # schema version of `audit.json`
CATEGORIES = ("compute", "data", "memory", "loop", "search")
NOT_STATED = "not stated"
Verdict = Literal["ok", "mismatch", "improve", "not applicable", "unknown"]


@dataclass(frozen=True)
class AuditConfig:
    """How much an audit measures.

    Attributes:
        rounds: how often each option is measured, in turns with the others. 0: nothing is switched on and off, and only
            what can be observed is reported. 5, as the interval of fewer is wide.
        time_limit: seconds after which no further round begins.
        compile_time_limit: seconds for compiling one layer, to predict what torch.compile saves; 0: do not try.
        json: a file where the audit is written as JSON too.

    Raises:
        ConfigError: a value is below 0.
    """

    rounds: int = 5
    time_limit: float = 90.0
    compile_time_limit: float = 30.0
    json: str | None = None

    def __post_init__(self) -> None:
        for name in ("rounds", "time_limit", "compile_time_limit"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class TimeSaved:
    """The share of a step's time that an optimization saves where it is on, against off; negative: it costs time.

    Attributes:
        low: the lower end of a 95 % interval.
        mid: the estimate.
        high: the upper end.
        kind: `measured` by running both sides, or `predicted` from another measurement.
        text: what was compared.
    """

    low: float
    mid: float
    high: float
    kind: Literal["measured", "predicted"]
    text: str


@dataclass(frozen=True)
class Fix:
    """What to do about a row.

    Attributes:
        text: what to change.
        effort: of the change.
        accuracy: its effect on the results.
        yaml: the line that does it, for an option of this package; empty: there is none.
    """

    text: str
    effort: str = ""
    accuracy: str = ""
    yaml: str = ""

    def __str__(self) -> str:
        """What to change, with its line of YAML."""
        return self.text + f" ({self.yaml})" * bool(self.yaml)


@dataclass(frozen=True)
class Row:
    """One optimization.

    Attributes:
        group: compute, data, memory, loop or search.
        name: of the optimization.
        requested: what the run's configuration asks for.
        in_effect: what was observed.
        verdict: `ok`; `mismatch`: requested, but not in effect; `improve`: time or memory can be saved;
            `not applicable`; `unknown`: it could not be observed.
        evidence: what was observed, in figures.
        time_saved: by the optimization where it is on, or would be; None: not known.
        fix: what to do; None: nothing.
    """

    group: str
    name: str
    requested: str = NOT_STATED
    in_effect: str = ""
    verdict: Verdict = "ok"
    evidence: str = ""
    time_saved: TimeSaved | None = None
    fix: Fix | None = None

    @property
    def alarm(self) -> bool:
        """Whether there is something to do."""
        return self.verdict in ("mismatch", "improve")

    def with_note(self, text: str) -> Row:
        """The same row with more evidence."""
        return replace(self, evidence=f"{self.evidence}; {text}")

    def unknown(self, evidence: str) -> Row:
        """The same row, of what could not be observed."""
        return replace(self, in_effect="?", verdict="unknown", evidence=evidence)


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


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        machine: that the figures hold for.
        rows: of all optimizations.
        step_ms: milliseconds from one batch to the next.
        parts: milliseconds of a batch by what they are spent on.
        peak: FLOP/s of matrix products against the machine's measured peak.
        next: what to do next, what it saves, and how certain that is.
    """

    machine: dict[str, Any]
    rows: tuple[Row, ...]
    step_ms: float
    parts: dict[str, float]
    peak: dict[str, Any]
    next: str

    def row(self, name: str) -> Row:
        """The row of a name.

        Raises:
            KeyError: there is none.
        """
        found = [row for row in self.rows if row.name == name]
        if not found:
            raise KeyError(f"no row {name}; there are: {', '.join(row.name for row in self.rows)}")
        return found[0]

    @property
    def alarms(self) -> list[Row]:
        """The rows with something to do: requested and not in effect, or with time or memory to save."""
        return [row for row in self.rows if row.alarm]

    @property
    def scores(self) -> list[Score]:
        """Time with the best known options over the time now, by category."""
        return scores(self.rows, self.step_ms)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as in `audit.json`."""
        return {
            "schema_version": AUDIT_SCHEMA,
            "machine": self.machine,
            "rows": [asdict(row) for row in self.rows],
            "scorecard": [asdict(score) for score in self.scores],
            "step": {"total_ms": self.step_ms, "parts": self.parts},
            "peak": self.peak,
            "next": self.next,
        }


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
        savings = {row.name: row.time_saved.mid for row in members if row.alarm and row.time_saved}
        savings = {name: saving for name, saving in savings.items() if saving > 0}
        left = math.prod(1 - saving for saving in savings.values())
        unmeasured = [row.name for row in members if row.verdict == "mismatch" and row.name not in savings]
        names = [*savings, *(f"{name} (its saving is not known)" for name in unmeasured)]
        whole = 100.0 if category == "search" else now_ms
        why = ", ".join(names) or "no measured option would save more"
        found.append(Score(category, left, whole, whole * left, why))
    return found
