"""The rate at which this machine multiplies big matrices: what utilisation is measured against."""

import math
from collections.abc import Hashable
from itertools import count
from time import perf_counter

import torch
from torch import Tensor

from lightning_bge.runtime.clock import wait_for

SMALLEST, LARGEST = 256, 4096  # square matrices; the largest that the time allows comes nearest to the peak
ROUNDS = 3
LIMIT_S = 0.15
GPU_CALLS = 10  # timed in one go, as one call is over before the host has seen that it is

_peaks: dict[Hashable, float] = {}


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest big matrix product that was seen, laid out as in a linear layer.

    Measured once a process for each device, dtype, number of threads and setting of TF32, in about 0.15 s. The matrices
    come from a random generator of their own: a training run's random numbers stay what they are.

    Args:
        device: where to multiply.
        dtype: of the matrices: bfloat16 for a run in bf16-mixed, float16 in 16-mixed.
    """
    key = (str(device), dtype, torch.get_num_threads(), torch.backends.cuda.matmul.fp32_precision)
    if key not in _peaks:
        _peaks[key] = _measure(device, dtype)
    return _peaks[key]


@torch.no_grad()
def _measure(device: torch.device, dtype: torch.dtype) -> float:
    """Three rounds or more of each size, doubling it as long as three rounds of the next one fit into the time left.

    The first product is not timed: it starts cuBLAS or oneDNN, and may take a hundred times as long as the next one.
    """
    generator = torch.Generator(device).manual_seed(0)
    calls = 1 if device.type == "cpu" else GPU_CALLS

    def matrices(size: int) -> tuple[Tensor, Tensor]:
        a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
        return a, b

    size, peak = SMALLEST, 0.0
    _seconds(*matrices(size), 1)
    end = perf_counter() + LIMIT_S
    while True:
        a, b = matrices(size)
        fastest = math.inf
        for rounds in count(1):
            fastest = min(fastest, _seconds(a, b, calls))
            peak, left = max(peak, 2 * size**3 / fastest), end - perf_counter()
            if left < calls * fastest:
                return peak
            if rounds >= ROUNDS and size < LARGEST and ROUNDS * 8 * calls * fastest < left:
                break
        size *= 2


def _seconds(a: Tensor, b: Tensor, calls: int) -> float:
    """Seconds of one product."""
    wait_for(a.device)
    since = perf_counter()
    for _ in range(calls):
        torch.mm(a, b.t())
    wait_for(a.device)
    return (perf_counter() - since) / calls
