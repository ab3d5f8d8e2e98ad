"""The clock that leaves out other processes' turns."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from lightning_bge.runtime import clock as device
from lightning_bge.runtime.clock import UnsharedClock, wait_for


@pytest.fixture
def scheduled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "schedstat"
    file.write_text("7000000000 0 5\n")
    monkeypatch.setattr(device, "SCHEDULED", file)
    monkeypatch.setattr(device, "perf_counter", lambda: 10.0)
    return file


def test_turns_of_others_are_left_out(scheduled: Path) -> None:
    clock = UnsharedClock()
    began = clock()
    scheduled.write_text("7000000000 2500000000 5\n")
    assert (began, clock()) == (10.0, 7.5)
    clock.close()
    clock.close()
    assert clock() == 10.0


def test_it_is_the_plain_clock_where_the_system_does_not_tell(scheduled: Path) -> None:
    scheduled.unlink()
    assert UnsharedClock()() == 10.0


def test_a_sleep_counts() -> None:
    clock = UnsharedClock()
    began = clock()
    time.sleep(0.05)
    waited = clock() - began
    clock.close()
    assert waited > 0.04


@pytest.mark.parametrize(("device", "waits"), [("cpu", False), ("cuda:1", True), ("mps", True)])
def test_a_gpu_of_any_kind_is_waited_for(device: str, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    wait_for(torch.device(device))
    assert waited == [torch.device(device)] * waits
