"""What was observed in a few training steps: their times, their batches, their optimizer steps, their traces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_bge.types import Batch

# The ends of the names by which Lightning tells its profiler what it does.
FETCH = "train_dataloader_next"
MOVE = "batch_to_device"
RUN = "run_training_batch"
WARM_UP = 2  # batches that are not timed: caches, the allocator, the optimizer's state, a first compilation


HOST = "host"
PARTS = ("matrix products", "attention", "dropout", "optimizer", "other operations", HOST)


@dataclass
class StepTrace:
    """What ran in the batches of one optimizer step.

    Attributes:
        seconds: of the step, the profiler's own time within.
        parts: seconds by part, `PARTS`. Of kernels where there is a GPU, else of operations; `host`: none of them ran.
        flops: floating-point operations of matrix products in forward and backward pass, by the dtype of their inputs:
            `bf16`, `fp32` ...
        forward_flops: those of the forward pass.
        masks: times random numbers were drawn for dropout in the forward pass.
        compiled: `lookups`: calls of what was given to torch.compile; of these the `regions` that ran compiled, the
            `flops` of their forward pass, and the `masks` drawn there, where one call may draw those of a whole graph.
        attention: calls of attention in the forward pass, by kernel.
        optimizer: operations of the optimizer's step, by name. Gradient clipping is not among them, unless the step has
            a closure.
        lookups: rows of an embedding table, and the number of ids, of each lookup in one.
        host_reads: values that the host read from tensors outside of the optimizer, by the line of code.
    """

    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    flops: Counter[str] = field(default_factory=Counter)
    forward_flops: int = 0
    masks: int = 0
    compiled: Counter[str] = field(default_factory=Counter)
    attention: Counter[str] = field(default_factory=Counter)
    optimizer: Counter[str] = field(default_factory=Counter)
    lookups: list[tuple[int, int]] = field(default_factory=list)
    host_reads: Counter[str] = field(default_factory=Counter)

    @property
    def dtype(self) -> str:
        """The dtype of most matrix products; empty: there were none."""
        return max(self.flops, key=lambda name: self.flops[name], default="")

    def __add__(self, other: StepTrace) -> StepTrace:
        """This and what ran in another batch of the same optimizer step."""
        names = [each.name for each in fields(self) if each.name != "parts"]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return StepTrace(parts={part: self.parts[part] + other.parts[part] for part in PARTS}, **sums)

    def without_preempted(self, seconds: float) -> StepTrace:
        """Less the seconds in which nothing ran because other processes had the cores."""
        idle = min(seconds, self.parts[HOST])
        return replace(self, seconds=self.seconds - idle, parts={**self.parts, HOST: self.parts[HOST] - idle})


@dataclass(frozen=True)
class BatchStats:
    """A batch as the loader returned it.

    Attributes:
        rows: sequences; None: the batch holds no tensors.
        tokens: tokens without padding; None: not known.
        padded_tokens: tokens with padding; None: the batch holds no `attention_mask`.
        width: tokens of a row with padding, in the mask with the least padding; None: as for `padded_tokens`.
        longest: tokens of the longest row there without padding; None: as for `padded_tokens`.
        pinned: whether its tensors are in page-locked memory; None: it holds none, or there is no GPU.
    """

    rows: int | None
    tokens: int | None
    padded_tokens: int | None
    width: int | None
    longest: int | None
    pinned: bool | None


@dataclass
class Cycle:
    """From one fetch of a batch to the next.

    A traced run does not count the seconds in which other processes had all the cores, its own workers among them.

    Attributes:
        actions: seconds by Lightning's name of what it did.
        seconds: of the whole.
        slowed: whether a trace, or torch.compile making a graph, slowed it down.
    """

    actions: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    slowed: bool = False

    def spent(self, *names: str) -> float:
        """Seconds in the actions whose names end so."""
        return sum(seconds for action, seconds in self.actions.items() if action.endswith(names))


@dataclass
class OptimizerSteps:
    """Which batches went into each optimizer step.

    Attributes:
        rows: of each step; None: not known.
        batches: number of batches in a step -> how often.
        left_over: batches after the last step of each epoch.
        stale_gradients: steps whose first backward pass found gradients: `zeros`, or `not cleared`. Not checked with
            several optimizers: gradients of one may exist while another one's are computed.
    """

    rows: list[int | None] = field(default_factory=list)
    batches: Counter[int] = field(default_factory=Counter)
    left_over: list[int] = field(default_factory=list)
    stale_gradients: Counter[str] = field(default_factory=Counter)

    @property
    def batches_per_step(self) -> int:
        """The usual number of batches in a step; the larger of equally frequent ones, as an epoch's last is short."""
        return max(self.batches, key=lambda count: (self.batches[count], count), default=0)


@dataclass
class DeviceState:
    """Measured when training ended, while the run's settings were still in force.

    Attributes:
        peak_bytes: the most memory that the process (on a GPU: the device's allocator) held.
        fp32_matmul: the setting for fp32 matrix products on a GPU, `tf32` or `ieee`.
        fp32_error: relative error of such a product against float64; None: not on a GPU.
        peak_flops: FLOP/s of the fastest matrix product in the dtype of most of the traced ones; None: none was traced.
    """

    peak_bytes: int = 0
    fp32_matmul: str = ""
    fp32_error: float | None = None
    peak_flops: float | None = None


@dataclass
class Observation:
    """What was observed in two short epochs.

    Attributes:
        cycles: one for each batch, except for the last one of an epoch.
        batches: as the loader returned them.
        steps: the optimizer steps.
        workers: process ids of the loader's workers in each epoch.
        graphs: graphs that torch.compile made in each batch.
        traces: of an optimizer step each.
        traced: the batches of the first one.
        located: whether a step was traced with lines of code.
        device: its state at the end.
    """

    cycles: list[Cycle] = field(default_factory=list)
    batches: list[BatchStats] = field(default_factory=list)
    steps: OptimizerSteps = field(default_factory=OptimizerSteps)
    workers: list[frozenset[int]] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)
    traces: list[StepTrace] = field(default_factory=list)
    traced: list[BatchStats] = field(default_factory=list)
    located: bool = False
    device: DeviceState = field(default_factory=DeviceState)

    @property
    def batches_per_step(self) -> int:
        """The usual number of batches in an optimizer step, and at least 1."""
        return max(self.steps.batches_per_step, 1)

    @property
    def trace(self) -> StepTrace | None:
        """The first of the traces."""
        return self.traces[0] if self.traces else None

    @property
    def timed(self) -> list[Cycle]:
        """The cycles that neither warm-up, a trace nor compilation slowed down."""
        return [cycle for cycle in self.cycles[WARM_UP:] if not cycle.slowed]

    def seconds(self, *names: str) -> float:
        """Median seconds of a batch in the actions whose names end so."""
        return median([cycle.spent(*names) for cycle in self.timed] or [0.0])

    @property
    def cycle_seconds(self) -> float:
        """Median seconds from one batch to the next."""
        return median([cycle.seconds for cycle in self.timed] or [0.0])


def batch_stats(batch: Any) -> BatchStats:
    """Count a batch on the host: one of this package, one with `...attention_mask` tensors [N, T], or any other."""
    tensors = list(_tensors(batch))
    pinned = all(tensor.is_pinned() for tensor in tensors) if tensors and torch.cuda.is_available() else None
    if isinstance(batch, Batch):
        lengths = [length for micro in batch.micro for length in micro.lengths]
        return BatchStats(batch.size, batch.tokens, None, None, max(lengths, default=0), pinned)
    masks = [mask for mask in _masks(batch) if mask.numel()]
    if masks:
        tokens, padded = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
        width, longest = min(
            ((mask.shape[1], int(mask.sum(dim=1).max())) for mask in masks), key=lambda pair: pair[0] - pair[1]
        )
        return BatchStats(len(masks[0]), tokens, padded, width, longest, pinned)
    rows = next((len(tensor) for tensor in tensors if tensor.ndim), None)
    return BatchStats(rows, None, None, None, None, pinned)


def _masks(batch: Any) -> Iterator[Tensor]:
    """Attention masks in a batch: of a query, of its passages..."""
    if isinstance(batch, list | tuple):
        for part in batch:
            yield from _masks(part)
    elif isinstance(batch, Mapping):
        for name, part in batch.items():
            if isinstance(part, Tensor):
                if str(name).endswith("attention_mask") and part.ndim == 2:
                    yield part
            else:
                yield from _masks(part)


def _tensors(batch: Any) -> Sequence[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Batch):
        return [micro.input_ids for micro in batch.micro]
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        return [tensor for part in batch for tensor in _tensors(part)]
    return []
