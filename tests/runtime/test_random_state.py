"""The state of the random number generators in a checkpoint."""

import random
from pathlib import Path

import numpy as np
import torch

from lightning_bge.runtime.random_state import random_state, set_random_state


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(())), float(np.random.randn())]


def test_what_is_drawn_after_a_restoration_is_the_same(tmp_path: Path) -> None:
    draws()  # an odd number of normal numbers: one is kept for the next call
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draws()
    draws()
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draws() == expected
