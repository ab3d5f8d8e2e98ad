"""A row of an audit, and what the rules judge it by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_bge.advisor.audit.observation import Observation
from lightning_bge.advisor.audit.requested import Requested

Verdict = Literal["ok", "mismatch", "improve", "not applicable", "unknown"]
NOT_STATED = "not stated"


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
    requested: str
    in_effect: str
    verdict: Verdict
    evidence: str
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

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class ObservedRun:
    """What the rules judge a run by.

    Attributes:
        seen: what was observed.
        requested: what the configuration asks for.
        module: after the run.
        trainer: after the run.
        devices: that the run is configured for; one of them was observed.
    """

    seen: Observation
    requested: Requested
    module: LightningModule
    trainer: Trainer
    devices: int = 1

    @property
    def device(self) -> torch.device:
        """Where the training ran."""
        return self.trainer.strategy.root_device


def on_off(value: bool | None) -> str:
    """A request as text."""
    return NOT_STATED if value is None else "on" if value else "off"


def no_trace(group: str, name: str, requested: str = NOT_STATED) -> Row:
    """A row for which an optimizer step had to be traced, and none was."""
    return Row(group, name, requested, "", "ok", "").unknown("no optimizer step ended while it was observed")


def alarms(rows: Sequence[Row]) -> list[Row]:
    """The rows with something to do."""
    return [row for row in rows if row.alarm]
