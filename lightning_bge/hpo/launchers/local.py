"""Workers on this machine: one for each GPU, or several that share the cores."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.launchers.launcher import last_lines, log_of, worker_arguments
from lightning_bge.hpo.storage.workers import WORKERS
from lightning_bge.runtime.run_folder import create_run_dir


@dataclass(frozen=True)
class Slot:
    """What one worker of several has.

    Attributes:
        device: of CUDA, as CUDA_VISIBLE_DEVICES names it, or several with commas; None: the CPU.
        share: how many workers the device has.
        threads: of a CPU; None: as torch decides.
    """

    device: str | None
    share: int
    threads: int | None


def slots(config: StudyConfig, ranks: int = 1) -> list[Slot]:
    """The workers of a study on this machine: `hpo.workers`, else `hpo.workers_per_device` for each GPU, else one.

    Args:
        config: the options of the study.
        ranks: devices of each worker, each with a process.

    Raises:
        ConfigError: there are not so many GPUs.
    """
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    if devices and len(devices) < ranks:
        raise ConfigError(f"trainer.devices: expected at most {len(devices)}, as there are no more GPUs, got {ranks}")
    devices = [",".join(devices[n : n + ranks]) for n in range(0, len(devices) - ranks + 1, ranks)]
    n_workers = config.workers or max(1, len(devices) * config.workers_per_device)
    if not devices:
        cores = len(os.sched_getaffinity(0))
        threads = None if "OMP_NUM_THREADS" in os.environ else max(1, cores // (n_workers * ranks))
        return [Slot(None, n_workers, threads)] * n_workers
    share = -(-n_workers // len(devices))
    return [Slot(devices[number % len(devices)], share, None) for number in range(n_workers)]


class WorkerProcess:
    """A process of `lightning-bge worker` on this machine.

    Args:
        arguments: of `lightning-bge`.
        log: file to which what it prints is added.
        environment: variables that it has besides those of this process.
    """

    def __init__(self, arguments: list[str], log: Path, environment: Mapping[str, str]) -> None:
        self.where, self._log = str(log), log
        create_run_dir(log.parent)
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
            # a group of its own: Ctrl-C in the terminal is for this process, which passes it on
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lightning_bge.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **environment},
                process_group=0,
            )

    def poll(self) -> int | None:
        """The exit status, negative after a signal; None: it runs."""
        return self._process.poll()

    def waits(self) -> bool:
        """It never does."""
        return False

    def wait(self) -> int:
        """Wait for its end; returns the exit status."""
        return self._process.wait()

    def output(self) -> str:
        """The last lines that it printed."""
        return last_lines(self._log)

    def terminate(self) -> None:
        """Ask it to save what it trains and to end."""
        self._process.terminate()

    def kill(self) -> None:
        """End it at once."""
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()


class LocalLauncher:
    """Starts workers on this machine.

    Args:
        slots: what each worker has.
    """

    def __init__(self, slots: list[Slot]) -> None:
        self._slots = slots

    @property
    def n_workers(self) -> int:
        """How many workers there are to be at once."""
        return len(self._slots)

    def describe(self, run_dir: Path) -> str:
        """Where the workers run, and where they print, in a line."""
        return f"{self.n_workers} workers; what each prints is in {run_dir / WORKERS}"

    def start(self, run_dir: Path, number: int, until: float | None) -> WorkerProcess:
        """Start a worker; see `Launcher.start`."""
        slot = self._slots[number]
        own = {} if slot.device is None else {"CUDA_VISIBLE_DEVICES": slot.device}
        own |= {} if slot.threads is None else {"OMP_NUM_THREADS": str(slot.threads)}
        arguments = worker_arguments(run_dir, slot.share, os.getpid(), until, time.time())
        return WorkerProcess(arguments, log_of(run_dir, number), own)
