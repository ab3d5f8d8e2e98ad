"""The probe of the machine's peak, on a simulated machine whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_bge.callbacks.throughput import peak
from lightning_bge.callbacks.throughput.peak import matmul_peak

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "_peaks", {})


class Machine:
    """Multiplies at a given rate, from a size on; smaller products run at a part of it.

    The first product of the process starts the library, and takes `start` seconds more.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pace: float, full_at: int = 1, start: float = 0.0) -> None:
        self.now, self.pace, self.full_at, self.start, self.sizes = 0.0, pace, full_at, start, list[int]()
        monkeypatch.setattr(peak, "perf_counter", lambda: self.now)
        monkeypatch.setattr(peak, "_seconds", self.seconds)
        monkeypatch.setattr(torch, "randn", lambda rows, columns, **_: torch.empty(rows, columns, device="meta"))

    def seconds(self, a: Tensor, b: Tensor, calls: int) -> float:
        size = len(a)
        seconds = 2 * size**3 / (self.pace * min(1.0, size / self.full_at))
        took = calls * seconds + (0.0 if self.sizes else self.start)
        self.sizes.append(size)
        self.now += took
        return took / calls


@pytest.mark.parametrize("pace", [1e9, 7e10, 3e12, 1e15])
def test_the_rate_is_found_in_little_time(monkeypatch: pytest.MonkeyPatch, pace: float) -> None:
    machine = Machine(monkeypatch, pace)
    assert matmul_peak(CPU, torch.float32) == pytest.approx(pace)
    assert machine.now < 0.2
    assert machine.sizes == sorted(machine.sizes)


def test_a_machine_that_needs_big_matrices_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 1e13, full_at=4096)
    assert matmul_peak(CPU, torch.float32) == pytest.approx(1e13)
    assert max(machine.sizes) == peak.LARGEST


def test_a_very_slow_machine_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 1e7)
    assert matmul_peak(CPU, torch.bfloat16) == pytest.approx(1e7)
    assert machine.sizes == [peak.SMALLEST] * 2


@pytest.mark.parametrize("start", [0.1, 1.0, 10.0])
def test_the_start_of_the_library_is_not_measured(monkeypatch: pytest.MonkeyPatch, start: float) -> None:
    machine = Machine(monkeypatch, 1e11, start=start)
    assert matmul_peak(CPU, torch.bfloat16) == pytest.approx(1e11)
    assert machine.now < start + 0.2


def test_measured_once_for_each_dtype_and_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []
    monkeypatch.setattr(peak, "_measure", lambda device, dtype: asked.append(dtype) or float(len(asked)))
    for _ in range(2):
        assert matmul_peak(CPU, torch.float32) == 1
        assert matmul_peak(CPU, torch.bfloat16) == 2
    torch.set_num_threads(2)
    assert matmul_peak(CPU, torch.float32) == 3
    assert asked == [torch.float32, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("calls", [1, 10])
def test_the_clock_is_read_when_the_device_has_finished(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """A device that only queues each product, and computes for 2 s when it is waited for."""
    now, queued = 7.0, 1  # one product of before is still in the queue

    def wait(device: torch.device) -> None:
        nonlocal now, queued
        assert device.type == "meta"
        now, queued = now + 2 * queued, 0

    def queue(a: Tensor, b: Tensor) -> None:
        nonlocal queued
        assert (a.shape, b.shape, b.stride()) == ((5, 5), (5, 5), (1, 5))  # a weight is stored transposed
        queued += 1

    monkeypatch.setattr(peak, "wait_for", wait)
    monkeypatch.setattr(peak, "perf_counter", lambda: now)
    monkeypatch.setattr(torch, "mm", queue)
    a, b = torch.empty(2, 5, 5, device="meta")
    assert peak._seconds(a, b, calls) == 2


def test_this_machine_has_a_peak_and_no_random_number_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_rng_state()
    found = matmul_peak(CPU, torch.float32)
    assert 1e7 < found < math.inf
    assert torch.equal(before, torch.get_rng_state())  # a run's random numbers are its own
