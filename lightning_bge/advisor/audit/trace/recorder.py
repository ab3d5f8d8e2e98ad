"""Records a training step with torch's profiler.

The profiler hears of each operation from within torch. A `TorchDispatchMode` would see as much, but Dynamo compiles
nothing under one: such an observer causes the very "not compiled" that it then reports.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lightning_bge.advisor.audit.trace.operations import STEP
from lightning_bge.advisor.audit.trace.reader import read_trace
from lightning_bge.advisor.audit.trace.step_trace import StepTrace


class Recorder:
    """Records what runs between `start` and `stop`.

    Args:
        device: of the training.
        with_stack: whether the trace holds lines of Python code. Off by default, as it is slow.
    """

    def __init__(self, device: torch.device, with_stack: bool = False) -> None:
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities, record_shapes=True, with_stack=with_stack)
        self._mark = record_function(STEP)

    def start(self) -> None:
        """Start recording."""
        with _quiet_kineto():
            self._profile.__enter__()
        self._mark.__enter__()

    def stop(self) -> StepTrace:
        """Stop recording, and read what ran."""
        self._mark.__exit__(None, None, None)
        with _quiet_kineto():
            self._profile.__exit__(None, None, None)
        results: Any = self._profile.profiler.kineto_results  # type: ignore[union-attr]
        return read_trace(results.experimental_event_tree(), results.events())


@contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Drop the profiler's messages, which its C++ library writes to stderr; everything else there is passed on."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            file.seek(0)
            for line in file.read().splitlines(keepends=True):
                if not line.startswith((b"USDT:", b"STAGE:")):
                    os.write(2, line)
            os.close(kept)
