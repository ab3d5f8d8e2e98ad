"""Reads a step's trace from the tree of operations that torch's profiler has recorded."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_bge.advisor.audit.observation import HOST, PARTS, StepTrace

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
STEP = "lightning_bge.audit.step"  # marks the traced part of a step

MATMULS = {"aten::mm", "aten::addmm", "aten::mv", "aten::addmv", "aten::_scaled_mm"}
MATMULS |= {"aten::mkldnn_linear", "mkldnn::_linear_pointwise", "aten::_addmm_activation"}
BATCHED_MATMULS = {"aten::bmm", "aten::baddbmm"}  # an encoder multiplies batches of matrices in attention alone
ATTENTION = {  # fused kernels, outermost operation -> its name in the report
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
# Their sequences are stored one after the other without padding: the shapes do not show how many keys a query has.
PACKED = {"aten::_flash_attention_forward", "torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward"}
CPU_PACKED = "CpuAttention"  # its matrix products are operations of their own in the trace
EAGER = "eager: scores as a tensor"
SOFTMAX = {"aten::softmax", "aten::_softmax", "aten::_safe_softmax"}
# Operations that draw random numbers. On CUDA dropout is one kernel, which contains none of the others.
DRAWS = {"aten::bernoulli_", "aten::bernoulli", "aten::random_", "aten::rand_like", "aten::rand", "aten::randint"}
DRAWS |= {"aten::native_dropout", "aten::_fused_dropout", "aten::uniform_"}
DROPOUT = {*DRAWS, "aten::dropout", "aten::dropout_", "_Drop", "_DropBackward", "aten::native_dropout_backward"}
COMPILED = re.compile(r"Torch-Compiled Region|CompiledFunction|## Call CompiledFxGraph")
BACKWARD = "autograd::engine::evaluate_function"
OPTIMIZER_STEP = "Optimizer.step#"

Shape = tuple[Any, list[int]]  # dtype and sizes of a tensor

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
    reader = _Reader(mark.start_time_ns, mark.end_time_ns, _updates(tree), on_gpu=bool(kernels))
    for root in tree:
        reader.read(root, _Context())
    if kernels:
        reader.read_kernels(kernels)
    reader.trace.parts[HOST] = max(0.0, reader.trace.seconds - _covered(reader.busy) / 1e9)
    return reader.trace


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


def _updates(tree: Sequence[Any]) -> list[tuple[int, int]]:
    """When optimizers updated weights, in nanoseconds.

    By time: the tree of a trace with lines of code does not hold what ran in a marked range below its mark.
    """
    steps, backward_ends, waiting = list[tuple[int, int]](), list[int](), list(tree)
    while waiting:
        event = waiting.pop()
        if event.name.startswith(OPTIMIZER_STEP):
            steps.append((event.start_time_ns, event.end_time_ns))
        elif event.name.startswith(BACKWARD):
            backward_ends.append(event.end_time_ns)
        waiting += event.children
    # forward and backward of a closure run within the step: the update is what comes after them
    return [(max([since, *(end for end in backward_ends if since < end < until)]), until) for since, until in steps]


class _Reader:
    def __init__(self, since: int, until: int, updates: list[tuple[int, int]], on_gpu: bool) -> None:
        self.since, self.until, self.updates, self.on_gpu = since, until, updates, on_gpu
        self.trace = StepTrace(seconds=(until - since) / 1e9)
        self.busy: list[tuple[int, int]] = []  # spans in which an operation, or a kernel, ran
        self.part_of_call: dict[int, str] = {}  # correlation id of an operation -> its part

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
        if name == STEP or name.startswith("Optimizer."):
            return above
        if name == "TorchDynamo Cache Lookup":
            self.trace.compiled["lookups"] += 1
            return above
        if COMPILED.match(name):
            self.trace.compiled["regions"] += name.startswith("Torch-Compiled Region")
            return replace(above, compiled=True)
        inputs = event.typed[1].inputs
        in_optimizer = any(since <= event.start_time_ns <= until for since, until in self.updates)
        context = replace(
            above,
            part=above.part or part_of(name, in_optimizer),
            backward=above.backward or name.startswith(BACKWARD),
        )
        draws = draws_mask(name, inputs)
        if draws and not (context.draws or context.backward or in_optimizer):
            self.trace.masks += 1
            self.trace.compiled["masks"] += context.compiled
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
            trace.optimizer[name] += 1
        if name == "aten::item" and not in_optimizer and self._waits(event):
            trace.host_reads[context.code or LIBRARY] += 1
        if context.backward:
            return
        if name == "aten::embedding" and len(shapes) > 1:
            [(_, table), (_, ids)] = shapes[:2]
            trace.lookups.append((table[0], math.prod(ids)))
        if name in ATTENTION and not context.attention:
            trace.attention[ATTENTION[name]] += 1
        elif name == "aten::_softmax" and not context.attention and are_attention_scores(shapes[0][1]):
            trace.attention[EAGER] += 1

    def _count_flops(self, name: str, shapes: Sequence[Shape], context: _Context) -> None:
        if context.product and not name.endswith("_for_cpu"):
            return
        count, dtype = flops_of(name, shapes)
        if count:
            self.trace.flops[dtype] += count
            self.trace.forward_flops += 0 if context.backward else count
            self.trace.compiled["flops"] += count if context.compiled and not context.backward else 0

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


# ---------------------------------------------------------------------- names of operations, and their cost


def part_of(name: str, in_optimizer: bool) -> str | None:
    """The part of a step's time that an operation belongs to; None: that of what it calls, or `other operations`."""
    if in_optimizer:
        return "optimizer"
    if name in ATTENTION or name in BATCHED_MATMULS or name in SOFTMAX:
        return "attention"
    if "scaled_dot_product" in name or CPU_PACKED in name:
        return "attention"
    if name in MATMULS:
        return "matrix products"
    return "dropout" if name in DROPOUT or "_Drop" in name else None


def counts_as_product(name: str) -> bool:
    """Whether the floating-point operations of a call include those of the operations that it calls."""
    return name in MATMULS or name in BATCHED_MATMULS or (name in ATTENTION and name != CPU_PACKED)


def flops_of(name: str, shapes: Sequence[Shape]) -> tuple[int, str]:
    """Floating-point operations of a matrix product or of attention, and the dtype of its inputs.

    Args:
        name: of the operation.
        shapes: of the tensors among its inputs.

    Returns:
        0 and an empty dtype for any other operation, and for packed attention.
    """
    matrices = [(dtype, shape) for dtype, shape in shapes if len(shape) >= 2]
    if len(matrices) < 2 or name in PACKED or not counts_as_product(name):
        return 0, ""
    if name in ATTENTION:
        (dtype, query), (_, key) = matrices[:2]
        keys = key[-3] if name == "flash_attn::_flash_attn_forward" else key[-2]  # [N, T, heads, D], [N, heads, T, D]
        return 4 * math.prod(query) * keys, dtype_name(dtype)
    # the first input of addmm and baddbmm is what the product is added to
    first = 1 if name in ("aten::addmm", "aten::baddbmm", "aten::_addmm_activation") and len(shapes) > 2 else 0
    if len(shapes) < first + 2:
        return 0, ""
    (dtype, a), (_, b) = shapes[first : first + 2]
    columns = b[0] if name in ("aten::mkldnn_linear", "mkldnn::_linear_pointwise") else b[-1]
    return 2 * math.prod(a) * columns, dtype_name(dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """`bf16`, `fp16`, `fp32`, `fp64`, or torch's name."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def are_attention_scores(shape: Sequence[int]) -> bool:
    """Whether a softmax over this shape is attention's, over scores [N, heads, T, T] or [N x heads, T, T].

    A softmax for pooling has the shape [N, T, 1].
    """
    return len(shape) == 4 or (len(shape) == 3 and shape[-1] == shape[-2])


def draws_mask(name: str, inputs: Sequence[Any]) -> bool:
    """Whether an operation draws a dropout mask: itself, or as attention called with a dropout probability.

    Args:
        name: of the operation.
        inputs: of the operation, as the profiler records them.
    """
    if name in DRAWS:
        return True
    if name == "aten::_flash_attention_forward":
        rates = inputs[7:8]
    elif "scaled_dot_product" in name:
        rates = inputs[3:5]
    else:
        return False
    return any(isinstance(part, float) and 0 < part < 1 for part in rates)
