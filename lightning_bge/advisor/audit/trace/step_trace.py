"""What ran in a traced optimizer step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

HOST = "host"
PARTS = ("matrix products", "attention", "dropout", "optimizer", "other operations", HOST)


@dataclass
class Flops:
    """Floating-point operations of matrix products.

    Attributes:
        by_dtype: of forward and backward pass, by the dtype they were computed in: `bf16`, `fp32` ...
        forward: of the forward pass.
        compiled: of the forward pass, inside compiled regions.
    """

    by_dtype: Counter[str] = field(default_factory=Counter)
    forward: int = 0
    compiled: int = 0

    @property
    def total(self) -> int:
        """Of all dtypes."""
        return sum(self.by_dtype.values())

    @property
    def dtype(self) -> str:
        """The dtype of most of them; empty: there were none."""
        return max(self.by_dtype, key=lambda name: self.by_dtype[name], default="")


@dataclass
class CompiledCalls:
    """Calls of what was given to torch.compile.

    Attributes:
        lookups: calls of functions that were given to torch.compile.
        regions: compiled regions that ran.
    """

    lookups: int = 0
    regions: int = 0


@dataclass
class DropoutMasks:
    """Times random numbers were drawn for dropout in the forward pass.

    Attributes:
        drawn: all of them.
        compiled: those in compiled regions, where one call may draw the masks of a whole graph.
    """

    drawn: int = 0
    compiled: int = 0


@dataclass
class OptimizerCalls:
    """What the optimizer called.

    Attributes:
        operations: of its step, by name. Gradient clipping is not among them, unless the step has a closure.
        zero_fills: operations of `zero_grad` that filled gradients with zeros.
    """

    operations: Counter[str] = field(default_factory=Counter)
    zero_fills: int = 0


@dataclass
class StepTrace:
    """What ran in the batches of one optimizer step.

    Attributes:
        seconds: of the step, the profiler's own time within.
        parts: seconds by part, `PARTS`. Of kernels where there is a GPU, else of operations; `host`: none of them ran.
        flops: of matrix products.
        compiled: calls of what was given to torch.compile.
        attention: calls of attention in the forward pass, by kernel.
        dropout: masks drawn in the forward pass.
        optimizer: what the optimizer called.
        embedding_lookups: rows of an embedding table -> number of ids of each lookup in it.
        host_reads: values that the host read from tensors outside of the optimizer, by the line of code.
        kernels: kernels on the GPU by name.
    """

    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    flops: Flops = field(default_factory=Flops)
    compiled: CompiledCalls = field(default_factory=CompiledCalls)
    attention: Counter[str] = field(default_factory=Counter)
    dropout: DropoutMasks = field(default_factory=DropoutMasks)
    optimizer: OptimizerCalls = field(default_factory=OptimizerCalls)
    embedding_lookups: dict[int, list[int]] = field(default_factory=dict)
    host_reads: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: StepTrace) -> StepTrace:
        """This and what ran in another batch of the same optimizer step."""
        return _sum(self, other)

    def without_preempted(self, seconds: float) -> StepTrace:
        """Less the seconds in which nothing ran because other processes had the cores."""
        idle = min(seconds, self.parts[HOST])
        return replace(self, seconds=self.seconds - idle, parts={**self.parts, HOST: self.parts[HOST] - idle})


def _sum(one: Any, other: Any) -> Any:
    """Numbers and lists are added, dicts by key, dataclasses by field."""
    if isinstance(one, dict):
        return type(one)({**one, **{key: one[key] + value if key in one else value for key, value in other.items()}})
    if is_dataclass(one) and not isinstance(one, type):
        return replace(
            one, **{each.name: _sum(getattr(one, each.name), getattr(other, each.name)) for each in fields(one)}
        )
    return one + other
