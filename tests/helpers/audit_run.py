"""Audits of small runs that are observed alone, without measuring what options save."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_bge.advisor.audit.audit import audit
from lightning_bge.advisor.audit.requested import Requested
from lightning_bge.advisor.audit.result import AuditConfig
from tests.helpers.foreign_modules import loader

OBSERVE = AuditConfig(rounds=0)
CPU: dict[str, Any] = {"accelerator": "cpu"}


def expect_alarm(
    module: L.LightningModule, row: str, data: Any = None, requested: Requested | None = None, **trainer: Any
) -> str:
    """Audit, expect an alarm in the row, and return its text."""
    found = audit(module, loader() if data is None else data, {**CPU, **trainer}, requested, OBSERVE)
    alarms = {one.name: one for one in found.alarms}
    assert row in alarms, found.row(row)
    fix = alarms[row].fix
    return f"{alarms[row].in_effect}; {alarms[row].evidence}; {fix.text if fix else ''}"
