"""What an optimization saves, measured with it on and off in turns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from lightning_bge.advisor.audit.ablation import (
    BATCHES,
    Ablation,
    Timings,
    confidence_interval,
    measure_ablations,
    optimizer_saving,
    time_saved,
)
from lightning_bge.advisor.audit.observation import Cycle
from lightning_bge.advisor.audit.observe import StepObserver


def test_the_interval_is_scipys() -> None:
    values = [0.1, 0.3, 0.2, 0.5]
    expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    low, mid, high = confidence_interval(values)
    assert (low, high) == pytest.approx(expected)
    assert mid == pytest.approx(np.mean(values))


@pytest.mark.parametrize("on", [True, False])
def test_time_saved_is_that_of_being_on_whichever_side_is_configured(on: bool) -> None:
    fast, slow = [1.0, 2.0, 1.5], [2.0, 4.0, 3.0]
    base, other = (fast, slow) if on else (slow, fast)
    found = time_saved(Ablation("row", {}, on, "a against b"), Timings(base, {"row": other}))
    assert found is not None
    assert found.mid == pytest.approx(0.5)
    assert found.low == pytest.approx(found.high) == pytest.approx(0.5)
    assert "1500 ms a batch against 3000 ms" in found.text


def test_no_time_saved_without_a_measurement() -> None:
    assert time_saved(Ablation("row", {}, True, ""), Timings()) is None


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


def test_options_are_measured_in_turns_on_the_same_number_of_batches() -> None:
    run = FakeRun()
    faster, slower = Ablation("x", {"seconds": 0.5}, False, ""), Ablation("y", {"seconds": 2.0}, False, "")
    found = measure_ablations(run, [faster, slower], rounds=3, time_limit=100)
    assert [call.get("seconds") for call in run.calls] == [None, 0.5, 2.0, 2.0, 0.5, None, None, 0.5, 2.0]
    assert found.configured == [1.0] * 3
    assert found.switched == {"x": [0.5] * 3, "y": [2.0] * 3}
    assert not found.skipped


@pytest.mark.parametrize("epoch", [2, 3, 5, 100])
def test_short_epochs_are_repeated_until_there_is_enough_to_time(epoch: int) -> None:
    run = FakeRun()
    assert measure_ablations(run, [], rounds=1, time_limit=1, epoch=epoch).configured == [1.0]
    assert run.timed >= BATCHES


def test_an_epoch_of_one_batch_cannot_be_timed() -> None:
    found = measure_ablations(FakeRun(), [Ablation("x", {}, False, "")], rounds=3, time_limit=1, epoch=1)
    assert found.skipped == {"x": "an epoch has one batch"}


def test_after_the_time_limit_what_was_measured_once_is_skipped() -> None:
    found = measure_ablations(FakeRun(), [Ablation("x", {}, False, "")], rounds=5, time_limit=0)
    assert "fewer than two rounds" in found.skipped["x"]
    assert time_saved(Ablation("x", {}, False, ""), found) is None


def test_an_option_that_cannot_be_trained_does_not_affect_the_others() -> None:
    run = FakeRun()
    broken, other = Ablation("x", {"broken": True}, False, ""), Ablation("y", {"seconds": 2.0}, False, "")
    found = measure_ablations(run, [broken, other], rounds=3, time_limit=100)
    assert found.skipped == {"x": "the other side cannot be trained: MemoryError: planted"}
    assert sum("broken" in call for call in run.calls) == 1
    assert time_saved(broken, found) is None
    saved = time_saved(other, found)
    assert saved is not None
    assert saved.mid == pytest.approx(-1.0)


def test_rounds_with_compilation_do_not_count() -> None:
    slow = Ablation("x", {"seconds": 2.0}, False, "")
    found = measure_ablations(FakeRun(compiling=1), [slow], rounds=3, time_limit=100)
    saved = time_saved(slow, found)
    assert math.isnan(found.configured[0])
    assert saved is not None
    assert saved.mid == pytest.approx(-1.0)
    assert "x" in measure_ablations(FakeRun(compiling=4), [slow], rounds=3, time_limit=100).skipped


def test_the_optimizers_saving_is_a_share_of_a_step() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    saved = optimizer_saving(model, torch.device("cpu"), step_s=1.0, rounds=3)
    assert saved is not None
    assert saved.kind == "measured"
    assert -1 < saved.low <= saved.mid <= saved.high < 1


def test_one_round_gives_no_saving_of_the_optimizer() -> None:
    assert optimizer_saving(nn.Linear(2, 2), torch.device("cpu"), 1.0, 1) is None


def test_a_model_without_parameters_has_no_optimizer_to_compare() -> None:
    assert optimizer_saving(nn.ReLU(), torch.device("cpu"), 1.0, 3) is None
