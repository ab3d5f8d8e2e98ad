"""A plugin of pytest that gives the tests a simulated CUDA device: `pytest -p tests.simulated_cuda.plugin ...`."""

from tests.simulated_cuda import preload

preload.load()

from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.simulated_cuda.device import DEVICE, SimulatedDevice, install  # noqa: E402

install()
torch.autograd.set_multithreading_enabled(False)  # else backward runs where no coverage looks


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    """The device, as it is at first."""
    DEVICE.reset()
    yield DEVICE
    DEVICE.reset()
