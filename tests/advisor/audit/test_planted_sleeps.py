"""Sleeps of a known length in the data, between the batches and within a step: the audit finds their length."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import pytest
from torch import Tensor

from lightning_bge.advisor.audit.audit import audit
from lightning_bge.advisor.audit.checks.row import Row
from tests.helpers.audit_run import CPU, OBSERVE
from tests.helpers.foreign_modules import Classifier, loader

SLEEP = 0.2  # seconds a batch


class Sleeping(Classifier):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        time.sleep(SLEEP)
        return super().training_step(batch, batch_idx)


class SleepingCallback(L.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(SLEEP)


def milliseconds(row: Row) -> float:
    assert row.verdict == "improve", row
    assert row.time_saved is not None
    return float(row.in_effect.split()[0])


def test_a_sleep_in_the_data() -> None:
    found = audit(Classifier(), loader(sleep=SLEEP / 8), CPU, config=OBSERVE)
    assert milliseconds(found.row("data wait")) == pytest.approx(1000 * SLEEP, rel=0.1)
    assert "data wait" in found.next


def test_a_sleep_between_the_batches() -> None:
    found = audit(Classifier(), loader(), {**CPU, "callbacks": [SleepingCallback()]}, config=OBSERVE)
    row = found.row("callbacks and loop")
    assert milliseconds(row) == pytest.approx(1000 * SLEEP, rel=0.1)
    assert "SleepingCallback" in row.evidence


def test_a_sleep_within_a_step() -> None:
    found = audit(Sleeping(), loader(), CPU, config=OBSERVE)
    assert milliseconds(found.row("host time within a step")) == pytest.approx(1000 * SLEEP, rel=0.1)
