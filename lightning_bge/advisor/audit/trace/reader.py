"""Reads a step's trace from the tree of operations that torch's profiler has recorded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_bge.advisor.audit.trace.operations import (
    ATTENTION,
    BACKWARD,
    COMPILED,
    EAGER,
    OPTIMIZER_STEP,
    STEP,
    ZERO_GRAD,
    Shape,
    are_attention_scores,
    counts_as_product,
    draws_mask,
    flops_of,
    part_of,
)
from lightning_bge.advisor.audit.trace.step_trace import HOST, PARTS, StepTrace

OTHER = "other operations"
TRANSPARENT = ("torch/", "nn.Module: ", "<")  # frames of Python that do what their caller asks for
LIBRARIES = ("lightning/", "transformers/", "lightning_fabric/", "pytorch_lightning/", "lightning_bge/")
LIBRARY = "?"  # stands for the line of code where a library read a value


def read_trace(tree: Sequence[Any], events: Sequence[Any] = ()) -> StepTrace:
    """Read the profiler's tree of operations.

    Args:
        tree: `experimental_event_tree()` of torch's profiler.
        events: its flat list, with what ran on a GPU; empty: everything ran on the host.
    """
    [mark] = [event for root in tree for event in _find(root, STEP)]
    kernels = [event for event in events if _is_kernel(event)]
    reader = _Reader(mark.start_time_ns, mark.end_time_ns, _OptimizerSpans.of(tree), on_gpu=bool(kernels))
    for root in tree:
        reader.read(root, _Context())
    if kernels:
        reader.read_kernels(kernels)
    return reader.finish()


@dataclass(frozen=True)
class _Context:
    """What an operation was called by.

    Attributes:
        part: of the step's time that it belongs to.
        compiled: a compiled region.
        backward: the backward pass.
        attention: a fused attention kernel.
        draws: an operation that draws a dropout mask.
        product: an operation whose floating-point operations include this one's.
        code: the line of the user's code.
    """

    part: str | None = None
    compiled: bool = False
    backward: bool = False
    attention: bool = False
    draws: bool = False
    product: bool = False
    code: str | None = None


@dataclass
class _OptimizerSpans:
    """When optimizers stepped and cleared gradients, in nanoseconds.

    By time: the tree of a trace with lines of code does not hold what ran in a marked range below its mark.
    """

    steps: list[tuple[int, int]] = field(default_factory=list)
    zero_grads: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, tree: Sequence[Any]) -> _OptimizerSpans:
        """Those of a whole tree."""
        found, backward_ends, waiting = cls(), list[int](), list(tree)
        while waiting:
            event = waiting.pop()
            span = event.start_time_ns, event.end_time_ns
            if event.name.startswith(OPTIMIZER_STEP):
                found.steps.append(span)
            elif event.name.startswith(ZERO_GRAD):
                found.zero_grads.append(span)
            elif event.name.startswith(BACKWARD):
                backward_ends.append(event.end_time_ns)
            waiting += event.children
        # forward and backward of a closure run within the step: the update is what comes after them
        found.steps = [
            (max([since, *(end for end in backward_ends if since < end < until)]), until)
            for since, until in found.steps
        ]
        return found

    def in_step(self, at: int) -> bool:
        return any(since <= at <= until for since, until in self.steps)

    def in_zero_grad(self, at: int) -> bool:
        return any(since <= at <= until for since, until in self.zero_grads)


class _Reader:
    def __init__(self, since: int, until: int, optimizer: _OptimizerSpans, on_gpu: bool) -> None:
        self.since, self.until, self.optimizer, self.on_gpu = since, until, optimizer, on_gpu
        self.trace = StepTrace(seconds=(until - since) / 1e9)
        self.busy: list[tuple[int, int]] = []  # spans in which an operation, or a kernel, ran
        self.part_of_call: dict[int, str] = {}  # correlation id of an operation -> its part

    def finish(self) -> StepTrace:
        self.trace.parts[HOST] = max(0.0, self.trace.seconds - _covered(self.busy) / 1e9)
        return self.trace

    def read(self, event: Any, above: _Context) -> None:
        """Add an operation and all that it called."""
        if event.end_time_ns <= self.since or event.start_time_ns >= self.until:
            return
        kind, context = str(event.typed[0]), above
        if kind.endswith("TorchOp"):
            context = self._read_operation(event, above)
        elif kind.endswith("PyCall") and not event.name.startswith(TRANSPARENT):
            context = replace(above, code=None if _is_library(event.name) else event.name)
        for child in event.children:
            self.read(child, context)

    def _read_operation(self, event: Any, above: _Context) -> _Context:
        name = event.name
        if name == STEP or name.startswith((OPTIMIZER_STEP, ZERO_GRAD)):
            return above
        if name == "TorchDynamo Cache Lookup":
            self.trace.compiled.lookups += 1
            return above
        if COMPILED.match(name):
            self.trace.compiled.regions += name.startswith("Torch-Compiled Region")
            return replace(above, compiled=True)
        in_optimizer, inputs = self.optimizer.in_step(event.start_time_ns), event.typed[1].inputs
        context = replace(
            above,
            part=above.part or part_of(name, in_optimizer),
            backward=above.backward or name.startswith(BACKWARD),
        )
        draws = draws_mask(name, inputs)
        if draws and not (context.draws or context.backward or in_optimizer):
            self.trace.dropout.drawn += 1
            self.trace.dropout.compiled += context.compiled
        self._count(event, context, in_optimizer)
        self._count_flops(name, _shapes(inputs), context)
        self._add_time(event, above.part, context.part)
        return replace(
            context,
            attention=above.attention or name in ATTENTION,
            draws=above.draws or draws,
            product=above.product or counts_as_product(name),
        )

    def _count(self, event: Any, context: _Context, in_optimizer: bool) -> None:
        name, trace, shapes = event.name, self.trace, _shapes(event.typed[1].inputs)
        if in_optimizer and name.startswith("aten::") and ("_fused_" in name or "_foreach_" in name or name[-1] == "_"):
            trace.optimizer.operations[name] += 1
        if self.optimizer.in_zero_grad(event.start_time_ns) and ("zero" in name or "fill" in name):
            trace.optimizer.zero_fills += 1
        if name == "aten::item" and not in_optimizer and self._waits(event):
            trace.host_reads[context.code or LIBRARY] += 1
        if context.backward:
            return
        if name == "aten::embedding" and len(shapes) > 1:
            [(_, table), (_, ids)] = shapes[:2]
            trace.embedding_lookups.setdefault(table[0], []).append(math.prod(ids))
        if name in ATTENTION and not context.attention:
            trace.attention[ATTENTION[name]] += 1
        elif name == "aten::_softmax" and not context.attention and are_attention_scores(shapes[0][1]):
            trace.attention[EAGER] += 1

    def _count_flops(self, name: str, shapes: Sequence[Shape], context: _Context) -> None:
        if context.product and not name.endswith("_for_cpu"):
            return
        count, dtype = flops_of(name, shapes)
        if count:
            self.trace.flops.by_dtype[dtype] += count
            if not context.backward:
                self.trace.flops.forward += count
                self.trace.flops.compiled += count if context.compiled else 0

    def _waits(self, event: Any) -> bool:
        """Whether the host reads a value that it has to wait for: with a GPU, one in the GPU's memory."""
        devices = [part.device.type for part in event.typed[1].inputs if hasattr(part, "device")]
        return not self.on_gpu or devices[:1] != ["cpu"]

    def _add_time(self, event: Any, above: str | None, part: str | None) -> None:
        """Add an operation's time to its part; what it calls belongs to the same part, or to one of its own."""
        since, until = max(event.start_time_ns, self.since), min(event.end_time_ns, self.until)
        self.part_of_call[event.correlation_id] = part or OTHER
        if above is None and part is not None:
            self.trace.parts[part] += (until - since) / 1e9
        if not event.name.startswith(BACKWARD) or part is not None:
            self.busy.append((since, until))
        if part is None:
            within = sum(
                min(child.end_time_ns, until) - max(child.start_time_ns, since) for child in _operations(event.children)
            )
            self.trace.parts[OTHER] += max(0, until - since - within) / 1e9

    def read_kernels(self, kernels: Sequence[Any]) -> None:
        """Replace the times of calls by those of the kernels that they launched."""
        self.trace.parts, self.busy = dict.fromkeys(PARTS, 0.0), []
        for event in kernels:
            since, until = event.start_ns(), event.start_ns() + event.duration_ns()
            self.trace.parts[self.part_of_call.get(event.linked_correlation_id(), OTHER)] += (until - since) / 1e9
            self.trace.kernels[event.name()] += 1
            self.busy.append((max(since, self.since), min(until, self.until)))


def _find(event: Any, name: str) -> Iterator[Any]:
    if event.name == name:
        yield event
        return
    for child in event.children:
        yield from _find(child, name)


def _operations(events: Sequence[Any]) -> Iterator[Any]:
    """The next operations below, past calls of Python."""
    for event in events:
        if str(event.typed[0]).endswith("TorchOp"):
            yield event
        else:
            yield from _operations(event.children)


def _shapes(inputs: Sequence[Any]) -> list[Shape]:
    """dtype and sizes of each tensor among an operation's inputs."""
    return [(part.dtype, list(part.sizes)) for part in inputs if hasattr(part, "sizes")]


def _covered(spans: Sequence[tuple[int, int]]) -> int:
    """Nanoseconds in at least one span."""
    total, end = 0, 0
    for since, until in sorted(spans):
        total += max(0, until - max(since, end))
        end = max(end, until)
    return total


def _is_library(name: str) -> bool:
    return name.startswith(LIBRARIES) or "site-packages" in name


def _is_kernel(event: Any) -> bool:
    """A kernel or a copy on the GPU. Marked ranges are listed there too, from their first kernel to their last."""
    return "CUDA" in str(event.device_type()) and not event.is_user_annotation()
