"""Clocks that mean something: a device is waited for, and other processes' turns on a core are left out."""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter

import torch

SCHEDULED = Path("/proc/thread-self/schedstat")


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class UnsharedClock:
    """Seconds, to take differences of, which stand still while the thread could run but others have all the cores.

    So a busy machine is not mistaken for a pause in the code; sleeping and waiting count. Others are all other threads,
    those of the own process too. Linux tells of it (the second
    number of `/proc/thread-self/schedstat`, in nanoseconds); elsewhere this is `perf_counter`. A reading takes 3
    microseconds. It is for the thread that made it.
    """

    def __init__(self) -> None:
        self._file = os.open(SCHEDULED, os.O_RDONLY) if SCHEDULED.exists() else None

    def __call__(self) -> float:
        """Now."""
        stolen = 0 if self._file is None else int(os.pread(self._file, 64, 0).split()[1])
        return perf_counter() - stolen / 1e9

    def close(self) -> None:
        """Give the file back; it is `perf_counter` afterwards."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
