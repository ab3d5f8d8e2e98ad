"""Several processes that train each trial of a study together, one for each device. The first one runs the study."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.runtime.distributed import as_the_first_decides
from lightning_bge.runtime.port import free_port

OUT_OF_MEMORY = 71  # exit status of a process that ran out of memory
PATIENCE = timedelta(days=365)  # of those that wait for the next fold: the first one may wait for other workers
ENVIRONMENT = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK")  # variables that Lightning reads
NOTICE_SECONDS = 5.0  # in which the end of a process is known after a connection to it has broken
POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class FoldTask:
    """What a process needs to train a fold with the first one.

    Attributes:
        params: of the trial, and `seed_everything`.
        earlier: of each fold before: its score, and its predictions where the module keeps them.
        reports: `FoldPruningCallback.state` of a fold that is continued, or of a new one.
        curve: its reports so far.
        steps_left: optimizer steps that are still to be made; None: it is not known.
        pauses: whether a trial that is pruned may be continued.
        n_objectives: of the study.
        checkpoint: of a fold that is continued; None: it is a new one.
    """

    params: dict[str, Any]
    earlier: list[tuple[float, Predictions | None]]
    reports: dict[str, Any]
    curve: list[tuple[Any, ...]]
    steps_left: int | None
    pauses: bool
    n_objectives: int
    checkpoint: str | None = None


class FollowedTrial:
    """Stands for a trial where another process runs it: nothing is reported.

    Args:
        n_objectives: of the study.
    """

    def __init__(self, n_objectives: int) -> None:
        self.study = SimpleNamespace(directions=[None] * n_objectives)


def pause_with_others(trainer: Trainer | None) -> None:
    """Take part in the checkpoint of a pause, if the first process writes one."""
    if as_the_first_decides(False):
        save_with_others(trainer)


def save_with_others(trainer: Trainer | None) -> None:
    """Take part in a checkpoint that the first process writes."""
    if trainer is not None:
        trainer.save_checkpoint("written by the first process")


@dataclass
class RankGroup:
    """The processes that train each trial together, as one of them sees them.

    Args:
        rank: of this process, from 0.
        size: how many there are.
        children: the others, as the first one has started them.

    Attributes:
        is_out_of_step: whether training has failed, so that no further trial can be trained.
        is_closed: whether the others have ended.
    """

    rank: int
    size: int
    children: Sequence[subprocess.Popen[bytes]] = ()
    is_out_of_step: bool = False
    is_closed: bool = False
    _control: Any = field(default=None, repr=False)
    _ends: threading.Event = field(default_factory=threading.Event, repr=False)

    @classmethod
    def lead(cls, size: int, arguments: Sequence[str], accelerator: str) -> RankGroup:
        """Start the other processes, and connect to them.

        Args:
            size: how many there are, with this one.
            arguments: of `lightning-bge` for each of them, but for its `--rank`.
            accelerator: where they train, `cuda` or another.
        """
        os.environ |= dict(zip(ENVIRONMENT, ("127.0.0.1", str(free_port()), str(size), "0", "0"), strict=True))
        command = [sys.executable, "-m", "lightning_bge.cli", *arguments]
        children = [
            subprocess.Popen(
                [*command, "--rank", str(rank)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the first process prints
                env={**os.environ, "LOCAL_RANK": str(rank)},
            )
            for rank in range(1, size)
        ]
        found = cls(0, size, children)
        threading.Thread(target=found._watch, daemon=True).start()
        found._connect(accelerator)
        return found

    @classmethod
    def join(cls, rank: int, parent: int, accelerator: str) -> RankGroup:
        """Connect to the first process, which has started this one, and end with it."""
        found = cls(rank, int(os.environ["WORLD_SIZE"]))
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        found._connect(accelerator)
        return found

    def _connect(self, accelerator: str) -> None:
        backend = "nccl" if accelerator == "cuda" else "gloo"
        dist.init_process_group(backend, rank=self.rank, world_size=self.size)
        self._control = dist.new_group(backend="gloo", timeout=PATIENCE)

    def send(self, task: FoldTask | None) -> None:
        """Tell the others what to train; None: nothing more."""
        dist.broadcast_object_list([task], src=0, group=self._control)

    def receive(self) -> FoldTask | None:
        """What to train next; None: nothing more."""
        found: list[FoldTask | None] = [None]
        dist.broadcast_object_list(found, src=0, group=self._control)
        return found[0]

    def close(self) -> None:
        """Let the others end; this process trains alone from here on."""
        if self.is_closed:
            return
        self.is_closed = True
        self._ends.set()
        if not self.is_out_of_step:
            self.send(None)
        for child in self.children:
            if self.is_out_of_step:
                child.kill()
            child.wait()
        dist.destroy_process_group()
        for name in ENVIRONMENT:  # else Lightning would take the next trainer for one of several
            del os.environ[name]

    def check(self) -> None:
        """Call it where training has failed: it is out of step with the others from here on.

        Where another one was killed, so is this one: the trial is then continued by others.

        Raises:
            torch.OutOfMemoryError: another one ran out of memory.
        """
        self.is_out_of_step = True
        until = time.monotonic() + NOTICE_SECONDS
        while time.monotonic() < until and all(child.poll() is None for child in self.children):
            time.sleep(POLL_SECONDS / 5)
        states = [child.poll() for child in self.children]
        if OUT_OF_MEMORY in states:
            raise torch.OutOfMemoryError("out of memory in another process of the trial")
        if any(state is not None and state < 0 for state in states):
            _die()

    def _watch(self) -> None:
        """End this process where another one has ended, and training has not noticed."""
        while not self._ends.wait(POLL_SECONDS):
            if any(child.poll() is not None for child in self.children):
                if not self._ends.wait(4 * NOTICE_SECONDS):
                    _die()
                return


def _die() -> None:
    """End at once, whatever is waited for: the trial is continued by others, as after any death of a worker."""
    os.kill(os.getpid(), signal.SIGKILL)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    _die()
