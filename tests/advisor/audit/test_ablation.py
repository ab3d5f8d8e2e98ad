from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from scipy import stats
from torch import nn

from lightning_bge.advisor.audit.ablation import (
    BATCHES,
    Measured,
    Variation,
    gain_of,
    interval,
    measure_variations,
    optimizer_gains,
)
from lightning_bge.advisor.audit.observe import Cycle, Watch


def test_the_interval_is_scipys() -> None:
    values = [0.1, 0.3, 0.2, 0.5]
    expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    low, mid, high = interval(values)
    assert (low, high) == pytest.approx(expected)
    assert mid == pytest.approx(np.mean(values))


@pytest.mark.parametrize("on", [True, False])
def test_a_gain_is_what_being_on_saves_whichever_side_the_run_is_on(on: bool) -> None:
    fast, slow = [1.0, 2.0, 1.5], [2.0, 4.0, 3.0]
    base, other = (fast, slow) if on else (slow, fast)
    found = gain_of(Variation("row", {}, on, "a against b"), Measured(base, {"row": other}))
    assert found is not None
    assert found.mid == pytest.approx(0.5)
    assert found.low == pytest.approx(found.high) == pytest.approx(0.5)
    assert "1500 ms a batch against 3000 ms" in found.text


def test_without_a_measurement_there_is_no_gain() -> None:
    assert gain_of(Variation("row", {}, True, ""), Measured()) is None


class Clockwork:
    """A run whose batches take as long as its settings say, without any training."""

    def __init__(self, compiling: int = 0) -> None:
        self.calls: list[dict[str, Any]] = []
        self.compiling, self.timed = compiling, 0  # the first so many calls compile in each batch

    def __call__(self, settings: dict[str, Any], callbacks: Sequence[Callback], limits: dict[str, Any]) -> Any:
        self.calls.append(settings)
        [watch] = callbacks
        assert isinstance(watch, Watch)
        seconds = settings.get("seconds", 1.0)
        if "broken" in settings:
            raise MemoryError("planted")
        each = limits["limit_train_batches"] - 1  # the last batch of an epoch is not timed
        slowed = len(self.calls) <= self.compiling
        count = each * limits["max_epochs"]
        watch.observation.cycles = [Cycle(seconds=seconds, slowed=slowed) for _ in range(count)]
        self.timed = len(watch.observation.timed)


def test_settings_are_measured_in_turns_on_the_same_number_of_batches() -> None:
    run = Clockwork()
    faster, slower = Variation("x", {"seconds": 0.5}, False, ""), Variation("y", {"seconds": 2.0}, False, "")
    found = measure_variations(run, [faster, slower], rounds=3, seconds=100)
    assert [call.get("seconds") for call in run.calls] == [None, 0.5, 2.0, 2.0, 0.5, None, None, 0.5, 2.0]
    assert found.base == [1.0] * 3
    assert found.others == {"x": [0.5] * 3, "y": [2.0] * 3}
    assert not found.skipped


@pytest.mark.parametrize("epoch", [2, 3, 5, 100])
def test_short_epochs_are_repeated_until_there_is_enough_to_time(epoch: int) -> None:
    run = Clockwork()
    assert measure_variations(run, [], rounds=1, seconds=1, epoch=epoch).base == [1.0]
    assert run.timed >= BATCHES


def test_an_epoch_of_one_batch_can_not_be_timed() -> None:
    found = measure_variations(Clockwork(), [Variation("x", {}, False, "")], 3, 1, epoch=1)
    assert found.skipped == {"x": "an epoch has one batch"}


def test_when_the_time_is_over_what_was_measured_once_counts_as_skipped() -> None:
    found = measure_variations(Clockwork(), [Variation("x", {}, False, "")], rounds=5, seconds=0)
    assert "fewer than two rounds" in found.skipped["x"]
    assert gain_of(Variation("x", {}, False, ""), found) is None


def test_a_setting_that_can_not_be_trained_leaves_the_others_their_gains() -> None:
    run = Clockwork()
    broken, other = Variation("x", {"broken": True}, False, ""), Variation("y", {"seconds": 2.0}, False, "")
    found = measure_variations(run, [broken, other], rounds=3, seconds=100)
    assert found.skipped == {"x": "the other side can't be trained: MemoryError: planted"}
    assert sum("broken" in call for call in run.calls) == 1
    assert gain_of(broken, found) is None
    gain = gain_of(other, found)
    assert gain is not None
    assert gain.mid == pytest.approx(-1.0)


def test_rounds_in_which_a_compiler_was_at_work_do_not_count() -> None:
    slow = Variation("x", {"seconds": 2.0}, False, "")
    found = measure_variations(Clockwork(compiling=1), [slow], rounds=3, seconds=100)
    gain = gain_of(slow, found)
    assert math.isnan(found.base[0])
    assert gain is not None
    assert gain.mid == pytest.approx(-1.0)
    assert "x" in measure_variations(Clockwork(compiling=4), [slow], rounds=3, seconds=100).skipped


def test_the_optimizers_gains_are_shares_of_a_step() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    found = optimizer_gains(model, torch.device("cpu"), step_s=1.0, rounds=3)
    assert set(found) == {"fused optimizer", "zero_grad(set_to_none=True)"}
    for gain in found.values():
        assert gain.kind == "measured"
        assert -1 < gain.low <= gain.mid <= gain.high < 1


def test_of_one_round_nothing_is_said() -> None:
    assert optimizer_gains(nn.Linear(2, 2), torch.device("cpu"), 1.0, 1) == {}


def test_a_model_without_parameters_has_no_optimizer_to_compare() -> None:
    assert optimizer_gains(nn.ReLU(), torch.device("cpu"), 1.0, 3) == {}
