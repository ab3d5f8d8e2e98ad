"""What really ran in a training step, read from the tree of operations that torch's profiler has seen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
STEP = "lightning_bge.audit.step"  # marks the watched part of a trace

PRODUCTS = {"aten::mm", "aten::addmm", "aten::mv", "aten::addmv", "aten::_scaled_mm"}
PRODUCTS |= {"aten::mkldnn_linear", "mkldnn::_linear_pointwise", "aten::_addmm_activation"}
BATCHED = {"aten::bmm", "aten::baddbmm"}  # an encoder multiplies batches of matrices in attention alone
KERNELS = {  # of attention, outermost first -> what users call them
    "aten::_scaled_dot_product_flash_attention_for_cpu": "sdpa: flash (CPU)",
    "aten::_scaled_dot_product_flash_attention": "sdpa: flash",
    "aten::_scaled_dot_product_efficient_attention": "sdpa: efficient",
    "aten::_scaled_dot_product_cudnn_attention": "sdpa: cuDNN",
    "aten::_scaled_dot_product_attention_math": "sdpa: math",
    "aten::_scaled_dot_product_attention_math_for_mps": "sdpa: math (MPS)",
    "aten::_flash_attention_forward": "flash, packed",
    "torch_attn::_varlen_attn": "varlen, packed",
    "CpuAttention": "packed (CPU)",
    "flash_attn::_flash_attn_varlen_forward": "flash-attn, packed",
    "flash_attn::_flash_attn_forward": "flash-attn",
    "flex_attention": "flex",
}
# Their texts stand one after the other without padding, so that the shapes don't tell how many keys each query meets.
PACKED = {"aten::_flash_attention_forward", "torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward"}
EAGER = "eager: scores written out"
SOFTMAX = {"aten::softmax", "aten::_softmax", "aten::_safe_softmax"}
# What draws random numbers. On CUDA dropout is one kernel, with nothing of these within.
DRAWS = {"aten::bernoulli_", "aten::bernoulli", "aten::random_", "aten::rand_like", "aten::rand", "aten::randint"}
DRAWS |= {"aten::native_dropout", "aten::_fused_dropout", "aten::uniform_"}
DROPOUT = {*DRAWS, "aten::dropout", "aten::dropout_", "_Drop", "_DropBackward", "aten::native_dropout_backward"}
COMPILED = re.compile(r"Torch-Compiled Region|CompiledFunction|## Call CompiledFxGraph")
BACKWARD = "autograd::engine::evaluate_function"
STEP_OF = "Optimizer.step#"
ZERO_OF = "Optimizer.zero_grad#"
WAITS = re.compile(r"cuda\w*Synchronize|hip\w*Synchronize")
TRANSPARENT = ("torch/", "nn.Module: ", "<")  # frames that do what their caller asks
LIBRARIES = ("lightning/", "transformers/", "lightning_fabric/", "pytorch_lightning/", "lightning_bge/")
PARTS = ("matrix products", "attention", "dropout", "optimizer", "other operations", "host")


@dataclass
class Trace:
    """What ran between two marks, at most one optimizer step apart.

    Attributes:
        seconds: between the marks, the profiler's own time within.
        stolen: those of them in which the training's thread could have run, but others had the cores.
        flops: floating-point operations of matrix products by the dtype they were computed in.
        parts: seconds by part, `PARTS`; operations on the device where there is one, `host` without any.
        forward_flops: of the forward pass.
        compiled_flops: the part of them inside compiled regions.
        lookups: calls of functions that were given to torch.compile.
        regions: compiled regions that ran.
        attention: calls of attention by kernel.
        masks: times random numbers were drawn for dropout in the forward pass.
        seeds: those of them in compiled regions, where one drawing may be for the masks of a whole graph.
        optimizer: operations of the optimizer's step by name; without clipping, but where the step has a closure.
        zeroed: operations that filled gradients with zeros.
        looked: lookups of token ids in an embedding's table: rows of the table -> numbers of ids of its calls.
        items: values that the host read from the device's tensors outside of the optimizer, by where in the code.
        kernels: kernels on the device by name.
        waited: seconds in which the host waited for the device.
    """

    seconds: float = 0.0
    stolen: float = 0.0
    flops: Counter[str] = field(default_factory=Counter)
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    forward_flops: int = 0
    compiled_flops: int = 0
    lookups: int = 0
    regions: int = 0
    attention: Counter[str] = field(default_factory=Counter)
    masks: int = 0
    seeds: int = 0
    optimizer: Counter[str] = field(default_factory=Counter)
    zeroed: int = 0
    looked: dict[int, list[int]] = field(default_factory=dict)
    items: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    waited: float = 0.0

    @property
    def dtype(self) -> str:
        """That of most matrix products; empty: there were none."""
        return max(self.flops, key=lambda name: self.flops[name], default="")

    def add(self, other: Trace) -> None:
        """Add what ran in another batch of the same optimizer step."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(value, Counter):
                mine.update(value)
            elif not isinstance(value, dict):
                setattr(self, name, mine + value)
        for part, seconds in other.parts.items():
            self.parts[part] += seconds
        for rows, counts in other.looked.items():
            self.looked.setdefault(rows, []).extend(counts)


@dataclass(frozen=True)
class _Place:
    """Where an operation stands in the tree of calls."""

    part: str | None = None
    compiled: bool = False
    backward: bool = False
    attention: bool = False
    draws: bool = False
    product: bool = False
    code: str | None = None


def read_trace(tree: Sequence[Any], events: Sequence[Any] = ()) -> Trace:
    """Read the profiler's tree of operations.

    Args:
        tree: `experimental_event_tree()` of torch's profiler.
        events: its flat list, for what ran on a device; empty: all ran on the host.
    """
    [mark] = [event for root in tree for event in _find(root, STEP)]
    since, until = mark.start_time_ns, mark.end_time_ns
    kernels = [event for event in events if _on_device(event)]
    reader = _Reader(since, until, _Spans.of(tree), bool(kernels))
    for root in tree:
        reader.read(root, _Place())
    reader.trace.seconds = (until - since) / 1e9
    if kernels:
        reader.read_device(events, kernels)
    else:
        reader.trace.parts["host"] = max(0.0, reader.trace.seconds - _covered(reader.spans) / 1e9)
    return reader.trace


@dataclass
class _Spans:
    """When optimizers stepped and zeroed gradients, and when backward passes ended: by time, as the tree of a trace
    with lines of code does not hold what ran in a marked range below its mark."""

    steps: list[tuple[int, int]] = field(default_factory=list)
    zeroes: list[tuple[int, int]] = field(default_factory=list)
    backwards: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, tree: Sequence[Any]) -> _Spans:
        found, waiting = cls(), list(tree)
        while waiting:
            event = waiting.pop()
            span = event.start_time_ns, event.end_time_ns
            if event.name.startswith(STEP_OF):
                found.steps.append(span)
            elif event.name.startswith(ZERO_OF):
                found.zeroes.append(span)
            elif event.name.startswith(BACKWARD):
                found.backwards.append(event.end_time_ns)
            waiting += event.children
        # with a closure forward and backward lie within the step: the update is what comes after them
        found.steps = [
            (max([since, *(end for end in found.backwards if since < end < until)]), until)
            for since, until in found.steps
        ]
        return found

    def updating(self, at: int) -> bool:
        return any(since <= at <= until for since, until in self.steps)

    def zeroing(self, at: int) -> bool:
        return any(since <= at <= until for since, until in self.zeroes)


class _Reader:
    def __init__(self, since: int, until: int, steps: _Spans, on_device: bool = False) -> None:
        self.trace, self.since, self.until, self.steps = Trace(), since, until, steps
        self.on_device = on_device
        self.spans: list[tuple[int, int]] = []
        self.part_of: dict[int, str] = {}  # correlation id of an operation -> its part

    def read(self, event: Any, above: _Place) -> None:
        """Add an operation and all that it called."""
        if event.end_time_ns <= self.since or event.start_time_ns >= self.until:
            return
        kind = str(event.typed[0])
        if kind.endswith("TorchOp"):
            place = self._operation(event, above)
        elif kind.endswith("PyCall") and not event.name.startswith(TRANSPARENT):
            place = _change(above, code=None if _of_library(event.name) else event.name)
        else:
            place = above
        for child in event.children:
            self.read(child, place)

    def _operation(self, event: Any, above: _Place) -> _Place:
        name, trace = event.name, self.trace
        if name == STEP or name.startswith((STEP_OF, ZERO_OF)):
            return above
        if name == "TorchDynamo Cache Lookup":
            trace.lookups += 1
            return above
        if COMPILED.match(name):
            trace.regions += name.startswith("Torch-Compiled Region")
            return _change(above, compiled=True)
        updating = self.steps.updating(event.start_time_ns)
        backward = above.backward or name.startswith(BACKWARD)
        part = above.part or _part(name, updating)
        self._count(event, _change(above, backward=backward), updating)
        self._time(event, above.part, part)
        return _change(
            above,
            part=part,
            backward=backward,
            attention=above.attention or name in KERNELS,
            draws=above.draws or _draws(event),
            product=above.product
            or name in PRODUCTS
            or name in BATCHED
            or (name in KERNELS and name != "CpuAttention"),
        )

    def _count(self, event: Any, place: _Place, updating: bool) -> None:
        name, trace = event.name, self.trace
        shapes = _shapes(event)
        if updating and name.startswith("aten::") and ("_fused_" in name or "_foreach_" in name or name.endswith("_")):
            trace.optimizer[name] += 1
        if self.steps.zeroing(event.start_time_ns) and ("zero" in name or "fill" in name):
            trace.zeroed += 1
        if name == "aten::item" and not updating and self._waits(event):
            trace.items[place.code or "?"] += 1
        if name == "aten::embedding" and len(shapes) > 1 and not place.backward:
            [(_, table), (_, ids)] = shapes[:2]
            trace.looked.setdefault(table[0], []).append(_size(ids))
        self._count_attention(name, shapes, place)
        if _draws(event) and not place.draws and not place.backward and not updating:
            trace.masks += 1
            trace.seeds += place.compiled
        if place.product and not name.endswith("_for_cpu"):
            return
        flops, dtype = _flops(name, shapes)
        if flops:
            trace.flops[dtype] += flops
            if not place.backward:
                trace.forward_flops += flops
                trace.compiled_flops += flops if place.compiled else 0

    def _waits(self, event: Any) -> bool:
        """Whether a value is read for which the host has to wait: where there is a GPU, one that lies there."""
        devices = [part.device.type for part in event.typed[1].inputs if hasattr(part, "device")]
        return not self.on_device or devices[:1] != ["cpu"]

    def _count_attention(self, name: str, shapes: list[tuple[Any, list[int]]], place: _Place) -> None:
        if place.attention or place.backward:
            return
        if name in KERNELS:
            self.trace.attention[KERNELS[name]] += 1
        elif name == "aten::_softmax" and _are_scores(shapes[0][1]):
            self.trace.attention[EAGER] += 1

    def _time(self, event: Any, above: str | None, part: str | None) -> None:
        """Give an operation's time to its part; what lies within an operation is of the same part or its own."""
        since, until = max(event.start_time_ns, self.since), min(event.end_time_ns, self.until)
        self.part_of[event.correlation_id] = part or "other operations"
        if above is None and part is not None:
            self.trace.parts[part] += (until - since) / 1e9
        if not event.name.startswith(BACKWARD) or part is not None:
            self.spans.append((since, until))
        if part is None:
            within = sum(
                min(child.end_time_ns, until) - max(child.start_time_ns, since) for child in _operations(event.children)
            )
            self.trace.parts["other operations"] += max(0, until - since - within) / 1e9

    def read_device(self, events: Sequence[Any], kernels: Sequence[Any]) -> None:
        """Times of kernels instead of those of the calls that launched them; `host` is what no kernel covers."""
        parts = dict.fromkeys(PARTS, 0.0)
        spans = []
        self.trace.waited = sum(event.duration_ns() for event in events if WAITS.match(event.name())) / 1e9
        for event in kernels:
            since, until = event.start_ns(), event.start_ns() + event.duration_ns()
            parts[self.part_of.get(event.linked_correlation_id(), "other operations")] += (until - since) / 1e9
            self.trace.kernels[event.name()] += 1
            spans.append((max(since, self.since), min(until, self.until)))
        parts["host"] = max(0.0, self.trace.seconds - _covered(spans) / 1e9)
        self.trace.parts = parts


def _part(name: str, updating: bool) -> str | None:
    if updating:
        return "optimizer"
    if name in KERNELS or name in BATCHED or name in SOFTMAX or "scaled_dot_product" in name or "CpuAttention" in name:
        return "attention"
    if name in PRODUCTS:
        return "matrix products"
    return "dropout" if name in DROPOUT or "_Drop" in name else None


def _change(place: _Place, **changes: Any) -> _Place:
    return _Place(**{**vars(place), **changes})


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


def _shapes(event: Any) -> list[tuple[Any, list[int]]]:
    """dtype and shape of each tensor among an operation's inputs."""
    return [(part.dtype, list(part.sizes)) for part in event.typed[1].inputs if hasattr(part, "sizes")]


def _are_scores(shape: list[int]) -> bool:
    """Whether a softmax over this shape is of attention's scores, [N, heads, T, T] or [N x heads, T, T]; pooling has
    [N, T, 1]."""
    return len(shape) == 4 or (len(shape) == 3 and shape[-1] == shape[-2])


def _draws(event: Any) -> bool:
    """Whether an operation draws a mask: by itself, or as attention that was called with a probability of dropout."""
    if event.name in DRAWS:
        return True
    if event.name == "aten::_flash_attention_forward":
        rates = event.typed[1].inputs[7:8]
    elif "scaled_dot_product" in event.name:
        rates = event.typed[1].inputs[3:5]
    else:
        return False
    return any(isinstance(part, float) and 0 < part < 1 for part in rates)


def _flops(name: str, shapes: list[tuple[Any, list[int]]]) -> tuple[int, str]:
    """Floating-point operations of a matrix product or of attention, and the dtype of its inputs."""
    matrices = [(dtype, shape) for dtype, shape in shapes if len(shape) >= 2]
    if len(matrices) < 2:
        return 0, ""
    if name in PACKED:
        return 0, ""
    if name in KERNELS and name != "CpuAttention":
        (dtype, q), (_, k) = matrices[:2]
        if name == "flash_attn::_flash_attn_forward":  # [N, T, heads, D]
            return 4 * _size(q) * k[-3], _name(dtype)
        return 4 * _size(q) * k[-2], _name(dtype)
    if name not in PRODUCTS and name not in BATCHED:
        return 0, ""
    # of addmm and baddbmm the first input is what the product is added to
    first = 1 if name in ("aten::addmm", "aten::baddbmm", "aten::_addmm_activation") and len(shapes) > 2 else 0
    if len(shapes) < first + 2:
        return 0, ""
    (dtype, a), (_, b) = shapes[first : first + 2]
    if name in ("aten::mkldnn_linear", "mkldnn::_linear_pointwise"):
        return 2 * _size(a) * b[0], _name(dtype)
    return 2 * _size(a) * b[-1], _name(dtype)


def _name(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def _size(shape: list[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _covered(spans: list[tuple[int, int]]) -> int:
    """Nanoseconds that lie in at least one span."""
    total, end = 0, 0
    for since, until in sorted(spans):
        total += max(0, until - max(since, end))
        end = max(end, until)
    return total


def _of_library(name: str) -> bool:
    return name.startswith(LIBRARIES) or "site-packages" in name


def _on_device(event: Any) -> bool:
    """A kernel or a copy; marks such as our own stand among them too, from their first kernel to their last."""
    return "CUDA" in str(event.device_type()) and not event.is_user_annotation()
