"""Pauses of known lengths in the data, between the batches and within a step: the audit finds what they take."""

from __future__ import annotations

import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest

from lightning_bge.advisor.audit.audit import audit
from lightning_bge.advisor.audit.bottleneck import next_step, step_parts
from lightning_bge.advisor.audit.checks_loop import callbacks, data_wait, host_time
from lightning_bge.advisor.audit.observation import FETCH, MOVE, RUN, Cycle, Observation, OptimizerSteps, StepTrace
from lightning_bge.advisor.audit.requested import ObservedRun, Requested
from lightning_bge.advisor.audit.result import Row
from tests.helpers.audit_run import CPU, OBSERVE
from tests.helpers.foreign_modules import Classifier, loader

SLEEP = 0.2  # seconds a batch
CALLBACK = "[Callback]SleepingCallback.on_train_batch_end"


def run(fetch: float = 0.0, between: float = 0.0, within: float = 0.0) -> ObservedRun:
    """Batches that compute for 50 ms, with 1 ms for fetch and move each, and the given pauses in seconds."""
    actions = {f"x.{FETCH}": 0.001 + fetch, f"x.{MOVE}": 0.001, RUN: 0.05 + within, CALLBACK: between}
    cycle = Cycle(actions, sum(actions.values()))
    trace = StepTrace(seconds=0.05 + within, parts={**StepTrace().parts, "matrix products": 0.05, "host": within})
    steps = OptimizerSteps(batches=Counter({1: 5}))
    trainer: Any = SimpleNamespace(train_dataloader=SimpleNamespace(num_workers=0))
    module: Any = SimpleNamespace()
    return ObservedRun(Observation([cycle] * 5, steps=steps, traces=[trace]), Requested(), module, trainer)


def expect_sleep(row: Row, planted: ObservedRun, extra: float = 0.0) -> None:
    assert row.verdict == "improve"
    assert float(row.in_effect.split()[0]) == pytest.approx(1000 * (SLEEP + extra))
    assert row.time_saved is not None
    assert row.time_saved.mid == pytest.approx((SLEEP + extra) / planted.seen.cycle_seconds)
    assert next_step([row], step_parts(planted), {}).startswith(f"Next: {row.name}")


def test_a_sleep_in_the_data() -> None:
    planted = run(fetch=SLEEP)
    expect_sleep(data_wait(planted), planted, extra=0.002)


def test_a_sleep_between_the_batches() -> None:
    planted = run(between=SLEEP)
    expect_sleep(callbacks(planted), planted)
    assert "SleepingCallback.on_train_batch_end 200.0 ms" in callbacks(planted).evidence


def test_a_sleep_within_a_step() -> None:
    planted = run(within=SLEEP)
    expect_sleep(host_time(planted), planted)


def test_without_a_sleep_there_is_nothing_to_improve() -> None:
    assert [rule(run()).verdict for rule in (data_wait, callbacks, host_time)] == ["ok"] * 3


# ---------------------------------------------------------------------- real sleeps, which are never shorter


class SleepingCallback(L.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(0.05)


def test_no_sleep_of_a_real_run_is_left_out() -> None:
    found = audit(Classifier(), loader(sleep=0.05 / 8), {**CPU, "callbacks": [SleepingCallback()]}, config=OBSERVE)
    for name in ("data wait", "callbacks and loop"):
        assert float(found.row(name).in_effect.split()[0]) >= 50
    assert "SleepingCallback" in found.row("callbacks and loop").evidence
