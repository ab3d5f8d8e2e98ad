"""Measuring time: waiting for a device, and a clock that leaves out the time for which others had the cores."""

import os
from pathlib import Path
from time import perf_counter

import torch

SCHEDULED = Path("/proc/thread-self/schedstat")


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that was queued; a CPU queues nothing."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class UnsharedClock:
    """A clock in seconds that stands still while its thread could run but other threads have all the cores.

    So a busy machine is not mistaken for a pause in the code; sleeping and waiting count. Only differences of readings
    have a meaning, and only in the thread that made the clock. Linux counts that time (the second number of
    `/proc/thread-self/schedstat`, in nanoseconds); elsewhere this is `perf_counter`. A reading takes 3 microseconds.
    """

    def __init__(self) -> None:
        self._file = os.open(SCHEDULED, os.O_RDONLY) if SCHEDULED.exists() else None

    def __call__(self) -> float:
        """Seconds."""
        stolen = 0 if self._file is None else int(os.pread(self._file, 64, 0).split()[1])
        return perf_counter() - stolen / 1e9

    def close(self) -> None:
        """Close the file; afterwards the clock is `perf_counter`."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
