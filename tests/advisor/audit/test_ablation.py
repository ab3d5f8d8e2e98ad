"""What an optimization saves, measured with it on and off in turns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lightning_bge.advisor.audit.ablation import BATCHES, Ablation, measure, time_saved
from lightning_bge.advisor.audit.observation import Cycle
from lightning_bge.advisor.audit.observe import StepObserver
from lightning_bge.advisor.audit.result import TimeSaved


def test_the_interval_is_scipys() -> None:
    off = [1.1, 1.3, 1.2, 1.5]
    found = time_saved(Ablation("row", {}, True, ""), [(1.0, seconds) for seconds in off])
    logs = -np.log(off)
    low, high = stats.t.interval(0.95, 3, np.mean(logs), stats.sem(logs))
    expected = (1 - math.exp(high), 1 - math.exp(np.mean(logs)), 1 - math.exp(low))
    assert (found.low, found.mid, found.high) == pytest.approx(expected)


@pytest.mark.parametrize("on", [True, False])
def test_time_saved_is_that_of_being_on_whichever_side_is_configured(on: bool) -> None:
    pairs = [(1.0, 2.0), (2.0, 4.0), (1.5, 3.0)]
    found = time_saved(Ablation("row", {}, on, "a against b"), pairs if on else [pair[::-1] for pair in pairs])
    assert found.mid == pytest.approx(0.5)
    assert found.low == pytest.approx(found.high) == pytest.approx(0.5)
    assert "1500 ms a batch against 3000 ms" in found.text


class FakeRun:
    """A run whose batches take as long as its options say, without any training."""

    def __init__(self, compiling: int = 0) -> None:
        self.calls: list[dict[str, Any]] = []
        self.compiling, self.timed = compiling, 0  # the first so many calls compile in each batch

    def __call__(self, options: dict[str, Any], observer: StepObserver, limits: dict[str, Any]) -> Any:
        self.calls.append(options)
        seconds = options.get("seconds", 1.0)
        if "broken" in options:
            raise MemoryError("planted")
        each = limits["limit_train_batches"] - 1  # the last batch of an epoch is not timed
        slowed = len(self.calls) <= self.compiling
        count = each * limits["max_epochs"]
        observer.observation.cycles = [Cycle(seconds=seconds, slowed=slowed) for _ in range(count)]
        self.timed = len(observer.observation.timed)


def saving(found: dict[str, TimeSaved | str], row: str) -> float:
    saved = found[row]
    assert isinstance(saved, TimeSaved)
    return saved.mid


def test_options_are_measured_in_turns_on_the_same_number_of_batches() -> None:
    run = FakeRun()
    faster, slower = Ablation("x", {"seconds": 0.5}, False, ""), Ablation("y", {"seconds": 2.0}, False, "")
    found = measure(run, [faster, slower], rounds=3, time_limit=100)
    assert [call.get("seconds") for call in run.calls] == [None, 0.5, 2.0, 2.0, 0.5, None, None, 0.5, 2.0]
    assert (saving(found, "x"), saving(found, "y")) == pytest.approx((0.5, -1.0))


@pytest.mark.parametrize("epoch", [2, 3, 5, 100])
def test_short_epochs_are_repeated_until_there_is_enough_to_time(epoch: int) -> None:
    run = FakeRun()
    assert measure(run, [], rounds=1, time_limit=1, epoch=epoch) == {}
    assert run.timed >= BATCHES


def test_an_epoch_of_one_batch_cannot_be_timed() -> None:
    found = measure(FakeRun(), [Ablation("x", {}, False, "")], rounds=3, time_limit=1, epoch=1)
    assert found == {"x": "its saving was not measured: an epoch has one batch"}


def test_after_the_time_limit_what_was_measured_once_is_not_used() -> None:
    found = measure(FakeRun(), [Ablation("x", {}, False, "")], rounds=5, time_limit=0)
    assert "fewer than two rounds" in str(found["x"])


def test_an_option_that_cannot_be_trained_does_not_affect_the_others() -> None:
    run = FakeRun()
    broken, other = Ablation("x", {"broken": True}, False, ""), Ablation("y", {"seconds": 2.0}, False, "")
    found = measure(run, [broken, other], rounds=3, time_limit=100)
    assert found["x"] == "its saving was not measured: the other side cannot be trained: MemoryError: planted"
    assert sum("broken" in call for call in run.calls) == 1
    assert saving(found, "y") == pytest.approx(-1.0)


def test_rounds_with_compilation_do_not_count() -> None:
    slow = Ablation("x", {"seconds": 2.0}, False, "")
    found = measure(FakeRun(compiling=1), [slow], rounds=3, time_limit=100)
    assert saving(found, "x") == pytest.approx(-1.0)
    assert "2 rounds" in found["x"].text  # type: ignore[union-attr]
    assert isinstance(measure(FakeRun(compiling=4), [slow], rounds=3, time_limit=100)["x"], str)
