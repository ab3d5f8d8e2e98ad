"""The simulated device notes what a GPU would wait for, and refuses what a GPU refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.simulated_cuda.device import SimulatedDevice


@pytest.mark.parametrize(
    "read", [float, Tensor.cpu, Tensor.nonzero, lambda x: x[x > 0], lambda x: torch.ones(()).cpu().copy_(x)]
)
def test_what_reads_a_value_waits(device: SimulatedDevice, read: Callable[[Tensor], object]) -> None:
    value = torch.ones((), device="cuda")
    device.waits.clear()
    read(value)
    assert device.waits
    device.set_sync_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        read(value)


def test_a_copy_waits_unless_it_is_queued(device: SimulatedDevice) -> None:
    host = torch.ones(3)
    host.to("cuda", non_blocking=True) + 1
    assert not device.waits
    host.to("cuda")
    assert device.waits


def test_tensors_of_two_devices_do_not_mix(device: SimulatedDevice) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.ones(3, device="cuda") + torch.ones(3)


def test_memory_has_an_end_and_is_given_back(device: SimulatedDevice) -> None:
    before = device.allocated
    held = torch.ones(256, device="cuda")
    assert device.allocated == before + 1024
    device.allow((device.allocated + 100) / device.total)
    with pytest.raises(torch.OutOfMemoryError):
        torch.ones(256, device="cuda")
    del held
    assert device.allocated == before
