"""Packed sequences on a device."""

from __future__ import annotations

import pytest
import torch

from lightning_bge.models.attention.packing import Packing

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pack(lengths: tuple[int, ...], device: torch.device = CPU) -> Packing:
    return Packing(lengths, torch.tensor([0, *lengths]).cumsum(0).int().to(device))
