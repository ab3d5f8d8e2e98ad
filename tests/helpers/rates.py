"""The learning rates of a plain loop."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def rates_of(optimizer: Optimizer, scheduler: LRScheduler, steps: int) -> list[float]:
    """The rate of the first group before each of so many steps."""
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found
