"""Observes a few real training steps of any LightningModule: how long they take, what they compute, what they see."""

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from lightning_bge.advisor.audit.observation import (
    FETCH,
    RUN,
    WARM_UP,
    BatchStats,
    Cycle,
    Observation,
    StepTrace,
    batch_stats,
)
from lightning_bge.advisor.audit.trace import DTYPES, STEP, read_trace
from lightning_bge.callbacks.throughput.peak import matmul_peak
from lightning_bge.runtime.clock import UnsharedClock, wait_for
from lightning_bge.runtime.compat.lightning import observe_batches
from lightning_bge.runtime.compat.torch import dynamo_counts
from lightning_bge.runtime.memory import process_bytes

TRACES = 3  # optimizer steps that are traced: their pauses differ


class StepTimer(Profiler):
    """Times each part of a batch: Lightning tells its profiler what it starts and stops doing.

    Args:
        observation: whose cycles it adds.

    Attributes:
        cycle: from the last fetch on; None: between two epochs.
    """

    def __init__(self, observation: Observation) -> None:
        super().__init__()
        self._observation = observation
        self.cycle: Cycle | None = None
        self._device, self._now = torch.device("cpu"), time.perf_counter
        self._around: Callable[[bool], None] = lambda before: None
        self._since: dict[str, float] = {}
        self._began = 0.0

    def begin(self, device: torch.device, now: Callable[[], float], around: Callable[[bool], None]) -> None:
        """Prepare for a training run.

        Args:
            device: waited for at the end of each batch.
            now: the clock.
            around: called with True before each batch's forward, backward and step, and with False after them.
        """
        self._device, self._now, self._around = device, now, around

    def start(self, action_name: str) -> None:
        """An action begins."""
        if action_name.endswith(FETCH):
            self._close()
            self.cycle, self._began = Cycle(), self._now()
        if action_name == RUN:
            self._around(True)
        self._since[action_name] = self._now()

    def stop(self, action_name: str) -> None:
        """An action has ended."""
        since = self._since.pop(action_name, None)
        if action_name == RUN:
            wait_for(self._device)
        if since is not None and self.cycle is not None:
            spent = self.cycle.actions.get(action_name, 0.0)
            self.cycle.actions[action_name] = spent + self._now() - since
        if action_name == RUN:
            self._around(False)

    def _close(self) -> None:
        if self.cycle is not None:
            self.cycle.seconds = self._now() - self._began
            self._observation.cycles.append(self.cycle)
            self.cycle = None

    def end_epoch(self) -> None:
        """Drop the cycle of the last batch: what follows it is no part of a step."""
        self.cycle = None


class StepObserver(Callback):
    """Observes `fit`; its trainer is to train two short epochs. To be the last of the callbacks.

    Three optimizer steps of the second epoch are traced, and where the host read values in the first of them, the next
    step too, with the lines of code that did.

    Args:
        trace: whether steps are traced; else batches are timed alone.

    Attributes:
        observation: what was observed.
        profiler: to be the trainer's profiler.
    """

    def __init__(self, trace: bool = True) -> None:
        self.observation, self.trace = Observation(), trace
        self.profiler = StepTimer(self.observation)
        self._rows: int | None = 0  # since the last optimizer step; None: not known
        self._batches = 0  # since the last optimizer step
        self._batch_idx = 0
        self._stepped = False
        self._first_backward = True  # no backward pass since the last optimizer step
        self._tracer = _Tracer()
        self._undo: list[Callable[[], Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to observe."""
        self._device, self._other_processes = pl_module.device, _children()
        unshared = UnsharedClock()
        # Runs that are compared are timed in wall-clock time: what other processes take is the same for both.
        self._now: Callable[[], float] = unshared if self.trace else time.perf_counter
        self.profiler.begin(pl_module.device, self._now, self._around)
        self._undo = [observe_batches(trainer, self._see), unshared.close]
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def _see(self, batch: Any) -> None:
        self.observation.batches.append(batch_stats(batch))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register hooks with the optimizers."""
        for optimizer in trainer.optimizers:
            self._undo.append(optimizer.register_step_post_hook(self._step).remove)

    def _step(self, *_: Any) -> None:
        self._stepped = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the loader's workers, and the graphs there are."""
        self._batch_idx = batch_idx
        if batch_idx == 0:
            self.observation.workers.append(_children() - self._other_processes)
        self._graphs = dynamo_counts()[-1]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check for gradients of the last step."""
        optimizers, steps = trainer.optimizers, self.observation.steps
        if self._first_backward and steps.rows and len(optimizers) == 1 and not self._tracer.active:
            groups = optimizers[0].param_groups
            grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            if grads:
                zero = not any(bool(grad.any()) for grad in grads)
                steps.stale_gradients["zeros" if zero else "not cleared"] += 1
        self._first_backward = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the rows that went into an optimizer step."""
        seen = self.observation
        seen.graphs.append(dynamo_counts()[-1] - self._graphs)
        if seen.graphs[-1] and self.profiler.cycle is not None:
            self.profiler.cycle.slowed = True
        rows = seen.batches[-1].rows
        self._rows = None if rows is None or self._rows is None else self._rows + rows
        self._batches += 1
        if self._stepped:
            seen.steps.rows.append(self._rows)
            seen.steps.batches[self._batches] += 1
            self._rows, self._batches, self._stepped, self._first_backward = 0, 0, False, True
            self._tracer.end_step(seen)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the batches after the last optimizer step."""
        self.observation.steps.left_over.append(self._batches)
        self._rows = self._batches = 0
        self._tracer.active = False
        self.profiler.end_epoch()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the device's state, and stop observing."""
        seen, state = self.observation, self.observation.device
        on_gpu = self._device.type == "cuda"
        state.peak_bytes = torch.cuda.max_memory_allocated(self._device) if on_gpu else process_bytes().get("VmHWM", 0)
        if self.trace:  # before the run's teardown, which resets torch's settings
            state.fp32_matmul = torch.backends.cuda.matmul.fp32_precision
            state.fp32_error = matmul_error(self._device) if on_gpu else None
            dtype = DTYPES.get(seen.trace.dtype) if seen.trace else None
            state.peak_flops = matmul_peak(self._device, dtype) if dtype else None
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop observing."""
        self._tracer.close()
        self._close()

    def _close(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    def _around(self, before: bool) -> None:
        """A batch's forward, backward and step begin, or have ended."""
        seen = self.observation
        if not before:
            self._tracer.end_batch(seen.batches[-1], self._now)
            return
        second_epoch = len(seen.steps.left_over) == 1 and len(seen.steps.rows) > 0
        if self.trace and second_epoch and self._batches == 0 and self._batch_idx >= WARM_UP:
            self._tracer.begin_step(seen)
        if self._tracer.active:
            assert self.profiler.cycle is not None
            self.profiler.cycle.slowed = True
            self._tracer.begin_batch(self._device, self._now)


class _Tracer:
    """Traces whole optimizer steps, batch by batch.

    Attributes:
        active: whether the batches of a step are being traced.
    """

    def __init__(self) -> None:
        self.active = False
        self._sum, self._batches = StepTrace(), list[BatchStats]()
        self._recorder: Recorder | None = None
        self._preempted = 0.0  # seconds that other processes had taken when the batch began
        self._locate = False  # whether the next step is traced with lines of code

    def begin_step(self, seen: Observation) -> None:
        """Trace the step that begins, where a trace is missing."""
        if not self.active and (len(seen.traces) < TRACES or self._locate):
            self.active, self._sum, self._batches = True, StepTrace(), []

    def begin_batch(self, device: torch.device, now: Callable[[], float]) -> None:
        """Record a batch of the step."""
        self._recorder = Recorder(device, with_stack=self._locate)
        self._recorder.start()
        self._preempted = time.perf_counter() - now()

    def end_batch(self, batch: BatchStats, now: Callable[[], float]) -> None:
        """Add what was recorded of the batch, if it was."""
        if self._recorder is not None:
            recorder, self._recorder = self._recorder, None
            preempted = time.perf_counter() - now() - self._preempted
            self._sum += recorder.stop().without_preempted(preempted)
            self._batches.append(batch)

    def end_step(self, seen: Observation) -> None:
        """Keep the trace of the step, if it was traced."""
        if not self.active:
            return
        self.active = False
        if self._locate:
            seen.traces[0].host_reads, seen.located, self._locate = self._sum.host_reads, True, False
            return
        seen.traces.append(self._sum)
        if len(seen.traces) == 1:
            seen.traced, self._locate = self._batches, bool(self._sum.host_reads)

    def close(self) -> None:
        """Stop the recorder, where one runs."""
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None


class Recorder:
    """Records what runs between `start` and `stop`, with torch's profiler.

    A `TorchDispatchMode` would see as much, but Dynamo compiles nothing under one: such an observer causes the very
    "not compiled" that it then reports.

    Args:
        device: of the training.
        with_stack: whether the trace holds lines of Python code. Off by default, as it is slow.
    """

    def __init__(self, device: torch.device, with_stack: bool = False) -> None:
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        else:  # its C++ library writes two lines to stderr for each trace; with a GPU, errors of the driver too
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self._profile = profile(activities=activities, record_shapes=True, with_stack=with_stack)
        self._mark = record_function(STEP)

    def start(self) -> None:
        """Start recording."""
        self._profile.__enter__()
        self._mark.__enter__()

    def stop(self) -> StepTrace:
        """Stop recording, and read what ran."""
        self._mark.__exit__(None, None, None)
        self._profile.__exit__(None, None, None)
        results: Any = self._profile.profiler.kineto_results  # type: ignore[union-attr]
        return read_trace(results.experimental_event_tree(), results.events())


def matmul_error(device: torch.device) -> float:
    """The relative error of an fp32 matrix product with the process's settings, against float64."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(512, 512, device=device, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).norm() / exact.norm())


def _children() -> frozenset[int]:
    return frozenset(process.pid for process in multiprocessing.active_children() if process.pid is not None)
