"""Waiting for a device, so that a clock on the host means something."""

from __future__ import annotations

import torch


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
