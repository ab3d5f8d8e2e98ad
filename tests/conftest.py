from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """One thread and a fixed seed; the global random state is put back."""
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True, scope="session")
def quiet_lightning() -> None:
    """Lightning says which hardware it found each time a trainer is made."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
