"""Watches a few real training steps of any LightningModule: what they take, what runs in them, what they see."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from torch import Tensor

from lightning_bge.advisor.audit.recorder import Recorder
from lightning_bge.advisor.audit.trace import DTYPES, Trace
from lightning_bge.callbacks.throughput.peak import matmul_peak
from lightning_bge.runtime.clock import UnsharedClock, wait_for
from lightning_bge.runtime.compat.torch import dynamo_counts
from lightning_bge.runtime.memory import process_bytes

FETCH = "train_dataloader_next"  # the end of Lightning's names of what it does
RUN = "run_training_batch"
MOVE = "batch_to_device"
TRACES = 3  # optimizer steps that are traced: their pauses differ
WARM_UP = 2  # batches that are not timed: caches, the allocator, the optimizer's state, a first compilation


@dataclass(frozen=True)
class Seen:
    """A batch as the loader gave it.

    Attributes:
        rows: sequences; None: the batch holds no tensors.
        tokens: real tokens; None: not known.
        places: tokens with the padding; None: the batch holds no `attention_mask`.
        width: tokens of a row with its padding, in the mask that is the fullest; None likewise.
        longest: real tokens of the longest row there; None likewise.
        pinned: whether its tensors lie in page-locked memory; None: there are none.
    """

    rows: int | None
    tokens: int | None
    places: int | None
    width: int | None
    longest: int | None
    pinned: bool | None


@dataclass
class Cycle:
    """What Lightning did from one fetch of a batch to the next: seconds by its own name of it.

    Of a run that is traced those are left out in which others had all the cores, the run's own workers among them.
    """

    actions: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    slowed: bool = False  # by the trace, or by torch.compile, which made a graph


@dataclass
class Observation:
    """What was seen in two short epochs.

    Attributes:
        cycles: one for each batch but an epoch's last.
        batches: as the loader gave them.
        windows: rows that went into each optimizer step; None: not known.
        behind: batches that went into an optimizer step -> how often.
        left: batches behind the last optimizer step of each epoch.
        kept: batches behind an optimizer step that began with gradients: all zero, or not. Not looked at where there
            are several optimizers: gradients of one may be there while another one's are made.
        workers: process ids of the loader's workers in each epoch.
        compiled: graphs that torch.compile made while each batch was trained.
        traces: of an optimizer step each.
        traced: the batches of the first one.
        located: whether one was traced with the lines of code.
        peak_bytes: the most memory that the process (the device's allocator) held.
        fp32: how a GPU multiplied fp32 matrices by its setting, `tf32` or `ieee`, before the run put anything back.
        fp32_error: the relative error of such a product then, against float64; None: not on a CPU.
        peak: FLOP/s of the machine's fastest matrix product, in the dtype of most of the traced ones; None: none were.
    """

    cycles: list[Cycle] = field(default_factory=list)
    batches: list[Seen] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)
    behind: Counter[int] = field(default_factory=Counter)
    left: list[int] = field(default_factory=list)
    kept: Counter[str] = field(default_factory=Counter)
    workers: list[frozenset[int]] = field(default_factory=list)
    compiled: list[int] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    traced: list[Seen] = field(default_factory=list)
    located: bool = False
    peak_bytes: int = 0
    fp32: str = ""
    fp32_error: float | None = None
    peak: float | None = None

    @property
    def batches_per_step(self) -> int:
        """Batches of an optimizer step; of windows that are as frequent the longer one, as an epoch's last is short."""
        return max(self.behind, key=lambda batches: (self.behind[batches], batches), default=0)

    @property
    def trace(self) -> Trace | None:
        """The first of the traces."""
        return self.traces[0] if self.traces else None

    @property
    def timed(self) -> list[Cycle]:
        """The cycles that were not slowed down by warming up, the trace or compiling."""
        return [cycle for cycle in self.cycles[WARM_UP:] if not cycle.slowed]

    def seconds(self, *names: str) -> float:
        """Median seconds of a batch spent in the actions whose names end so."""
        found = [sum(spent for action, spent in one.actions.items() if action.endswith(names)) for one in self.timed]
        return median(found) if found else 0.0

    @property
    def cycle_seconds(self) -> float:
        """Median seconds from one batch to the next."""
        return median(cycle.seconds for cycle in self.timed) if self.timed else 0.0


class _Clock(Profiler):
    """Lightning tells its profiler what it does: the door through which each part of a batch is timed."""

    def __init__(
        self, observation: Observation, around: Callable[[bool], None], device: torch.device, now: Callable[[], float]
    ) -> None:
        super().__init__()
        self.observation, self.around, self.device, self.now = observation, around, device, now
        self.cycle: Cycle | None = None
        self._since: dict[str, float] = {}
        self._began = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith(FETCH):
            self._close()
            self.cycle, self._began = Cycle(), self.now()
        if action_name == RUN:
            self.around(True)
        self._since[action_name] = self.now()

    def stop(self, action_name: str) -> None:
        since = self._since.pop(action_name, None)
        if action_name == RUN:
            wait_for(self.device)
        if since is not None and self.cycle is not None:
            spent = self.cycle.actions.get(action_name, 0.0)
            self.cycle.actions[action_name] = spent + self.now() - since
        if action_name == RUN:
            self.around(False)

    def _close(self) -> None:
        if self.cycle is not None:
            self.cycle.seconds = self.now() - self._began
            self.observation.cycles.append(self.cycle)
            self.cycle = None

    def drop(self) -> None:
        """An epoch is over: what follows its last batch is no part of a step."""
        self.cycle = None


class Watch(Callback):
    """Watches `fit`; its trainer is to make two short epochs. The last of the callbacks.

    Three optimizer steps of the second epoch are traced, and where the host read values in the first, the next one too,
    with the lines of code from which it did.

    Args:
        trace: trace a step; else batches are timed alone.

    Attributes:
        observation: what was seen.
    """

    def __init__(self, trace: bool = True) -> None:
        self.observation, self.trace = Observation(), trace
        self._open: int | None = 0  # rows behind the last optimizer step; None: not known
        self._behind = 0  # batches behind it
        self._sum, self._parts = Trace(), list[Seen]()  # of the step being traced
        self._stepped = False
        self._fresh = True  # no backward pass since the last optimizer step
        self._recorder: Recorder | None = None
        self._began = 0.0  # what others had taken of the cores when the trace began
        self._tracing = False
        self._where: bool | None = False  # whether lines of code are to be traced; None: they were
        self._graphs = 0
        self._undo: list[Callable[[], Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the doors."""
        unshared = UnsharedClock()
        # runs that are compared are a matter of the clock on the wall: what others take is the same for both
        self._clock = _Clock(
            self.observation, self._around, pl_module.device, unshared if self.trace else time.perf_counter
        )
        self._trainer, self._device, self._others = trainer, pl_module.device, _children()
        old, move = trainer.profiler, trainer.strategy.batch_to_device  # type: ignore[attr-defined]
        trainer.profiler = self._clock  # type: ignore[attr-defined]

        def watched(batch: Any, *args: Any, **options: Any) -> Any:
            if trainer.training:
                self.observation.batches.append(look_at(batch))
            return move(batch, *args, **options)

        trainer.strategy.batch_to_device = watched  # type: ignore[method-assign]
        self._undo = [
            lambda: setattr(trainer, "profiler", old),
            lambda: vars(trainer.strategy).pop("batch_to_device", None),
            unshared.close,
        ]
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hear of each optimizer step."""
        for optimizer in trainer.optimizers:
            self._undo.append(optimizer.register_step_post_hook(self._step).remove)

    def _step(self, *_: Any) -> None:
        self._stepped = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note who the workers are."""
        if batch_idx == 0:
            self.observation.workers.append(_children() - self._others)
        self._graphs = dynamo_counts()[-1]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Are there gradients left of the last step?"""
        optimizers = trainer.optimizers
        if self._fresh and self.observation.windows and len(optimizers) == 1 and not self._tracing:
            groups = optimizers[0].param_groups
            grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            if grads:
                zero = not any(bool(grad.any()) for grad in grads)
                self.observation.kept["zeros" if zero else "not cleared"] += 1
        self._fresh = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the rows that went into an optimizer step."""
        seen = self.observation
        seen.compiled.append(dynamo_counts()[-1] - self._graphs)
        if seen.compiled[-1] and self._clock.cycle is not None:
            self._clock.cycle.slowed = True
        rows = seen.batches[-1].rows
        self._open = None if rows is None or self._open is None else self._open + rows
        self._behind += 1
        if self._stepped:
            seen.windows.append(self._open)
            seen.behind[self._behind] += 1
            self._open, self._behind, self._stepped, self._fresh = 0, 0, False, True
            if self._tracing:
                self._traced()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What no optimizer step has seen stays behind."""
        self.observation.left.append(self._behind)
        self._open = self._behind = 0
        self._tracing = False
        self._clock.drop()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the doors."""
        seen = self.observation
        if self._device.type == "cuda":
            seen.peak_bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            seen.peak_bytes = process_bytes().get("VmHWM", 0)
        if self.trace:  # as long as the run's settings are in force: they are put back when it is torn down
            seen.fp32 = torch.backends.cuda.matmul.fp32_precision
            seen.fp32_error = product_error(self._device) if self._device.type == "cuda" else None
            dtype = DTYPES.get(seen.trace.dtype) if seen.trace else None
            seen.peak = matmul_peak(self._device, dtype) if dtype else None
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None
        self._close()

    def _close(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    # ------------------------------------------------------------------ the trace of one optimizer step

    def _around(self, before: bool) -> None:
        """A batch's forward, backward and step begin, or have ended."""
        seen = self.observation
        second = len(seen.left) == 1 and len(seen.windows) > 0 and self._behind == 0
        if before and second and not self._tracing and self._wanted() and self._batch_number() > WARM_UP:
            self._tracing, self._sum, self._parts = True, Trace(), []
        if not self._tracing:
            return
        if before:
            assert self._clock.cycle is not None
            self._clock.cycle.slowed = True
            self._recorder = Recorder(self._device, with_stack=bool(self._where))
            self._recorder.start()
            self._began = time.perf_counter() - self._clock.now()
        elif self._recorder is not None:
            recorder, self._recorder = self._recorder, None
            stolen = time.perf_counter() - self._clock.now() - self._began
            self._sum.add(recorder.stop())
            self._sum.stolen += stolen
            self._parts.append(seen.batches[-1])

    def _batch_number(self) -> int:
        return self._trainer.fit_loop.epoch_loop.batch_idx + 1

    def _wanted(self) -> bool:
        """Whether a trace is missing: of a step, or of where in the code the host reads values."""
        return self.trace and (len(self.observation.traces) < TRACES or bool(self._where))

    def _traced(self) -> None:
        seen = self.observation
        self._tracing = False
        if self._where:
            seen.traces[0].items, seen.located, self._where = self._sum.items, True, None
            return
        seen.traces.append(self._sum)
        if len(seen.traces) == 1:
            seen.traced, self._where = self._parts, bool(self._sum.items)


def look_at(batch: Any) -> Seen:
    """Count a batch as it lies on the host: ours, one that holds `...attention_mask`s [N, T], or any other."""
    tensors = list(_tensors(batch))
    pinned = all(tensor.is_pinned() for tensor in tensors) if tensors and torch.cuda.is_available() else None
    if hasattr(batch, "tokens") and hasattr(batch, "size"):
        lengths = [length for micro in batch.micro for length in micro.lengths]
        return Seen(batch.size, batch.tokens, None, None, max(lengths, default=0), pinned)
    masks = [mask for mask in _masks(batch) if mask.numel()]
    if masks:
        tokens, places = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
        width, longest = min(
            ((mask.shape[1], int(mask.sum(dim=1).max())) for mask in masks), key=lambda pair: pair[0] - pair[1]
        )
        return Seen(len(masks[0]), tokens, places, width, longest, pinned)
    rows = next((len(tensor) for tensor in tensors if tensor.ndim), None)
    return Seen(rows, None, None, None, None, pinned)


def _masks(batch: Any) -> Iterator[Tensor]:
    """Attention masks in a batch: of a query, of its passages..."""
    if isinstance(batch, list | tuple):
        for part in batch:
            yield from _masks(part)
    elif hasattr(batch, "items"):
        for name, part in batch.items():
            if isinstance(part, Tensor):
                if str(name).endswith("attention_mask") and part.ndim == 2:
                    yield part
            else:
                yield from _masks(part)


def _tensors(batch: Any) -> Sequence[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    if hasattr(batch, "micro"):
        return [micro.input_ids for micro in batch.micro]
    if hasattr(batch, "values"):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        return [tensor for part in batch for tensor in _tensors(part)]
    return []


def product_error(device: torch.device) -> float:
    """The relative error of an fp32 matrix product, as the process multiplies now, against float64."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(512, 512, device=device, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).norm() / exact.norm())


def _children() -> frozenset[int]:
    return frozenset(process.pid for process in multiprocessing.active_children() if process.pid is not None)
