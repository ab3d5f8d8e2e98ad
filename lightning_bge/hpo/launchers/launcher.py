"""What starts the workers of a study, and what can be done with one that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from lightning_bge.hpo.storage.workers import WORKERS

LAST_LINES = 20  # of what a worker printed, in messages
ERROR = "lightning-bge: "  # what an error that the user can fix begins with, as the program prints it


class RunningWorker(Protocol):
    """A worker that was started.

    Attributes:
        where: what it prints is found there.
    """

    where: str

    def poll(self) -> int | None:
        """The exit status, negative after a signal; None: it runs."""

    def waits(self) -> bool:
        """Whether it has not begun, as there is no machine for it now; a worker that lives may rarely seem to."""

    def output(self) -> str:
        """The last lines that it printed; call it once the worker has ended."""

    def terminate(self) -> None:
        """Ask it to save what it trains and to end."""

    def kill(self) -> None:
        """End it at once, and free what it holds."""


class Launcher(Protocol):
    """Starts workers."""

    @property
    def n_workers(self) -> int:
        """How many workers there are to be at once."""

    def describe(self, run_dir: Path) -> str:
        """Where the workers run, and where they print, in a line."""

    def start(self, run_dir: Path, number: int, until: float | None) -> RunningWorker:
        """Start a worker.

        Args:
            run_dir: of the study, which was created.
            number: of the worker, from 0.
            until: begin no trial after this time, of `time.time()`; None: there is no limit.
        """


def worker_arguments(run_dir: Path, share: int, parent: int, until: float | None, now: float) -> list[str]:
    """The arguments of `lightning-bge` for a worker.

    Args:
        run_dir: of the study.
        share: how many workers the device has.
        parent: the process without which it stops.
        until: begin no trial after this time, in seconds; None: there is no limit.
        now: the time, of the same clock.
    """
    arguments = ["worker", str(run_dir.resolve()), "--share", str(share), "--parent", str(parent)]
    return arguments if until is None else [*arguments, "--timeout", f"{max(0.001, until - now):.3f}"]


def log_of(run_dir: Path, number: int) -> Path:
    """The file to which a worker's prints go."""
    return run_dir / WORKERS / f"worker-{number}.log"


def last_lines(path: Path) -> str:
    """The last lines of a file."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])


def last_error(output: str) -> str:
    """The last error in what a worker printed."""
    _, mark, text = output.rpartition(ERROR)
    return text.strip() if mark else output
