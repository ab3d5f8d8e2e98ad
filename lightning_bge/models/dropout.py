"""Dropout whose random numbers cost little on a CPU.

There a step of a small encoder spends a sixth of its time drawing one random float for each element: torch's generator
is serial. Here each 64-bit draw serves four elements with 16 bits each, which fixes the probability to 1 / 65536.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEVELS = 2**16
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def keep_bits(size: int, p: float, dtype: torch.dtype) -> Tensor:
    """What dropout keeps: all bits set, or none with probability `p`, in integers [size] as wide as `dtype`.

    On the CPU, where any operation on booleans takes several times as long.

    Args:
        size: number of elements.
        p: probability of 0, at least 0 and below 1; rounded to a multiple of 1 / 65536.
        dtype: floating type of what is to be masked.
    """
    draws = torch.empty((size + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:size]
    return draws.ge_(_dropped(p) - LEVELS // 2).neg_().to(INTEGERS[dtype.itemsize])


def keep_scale(p: float) -> float:
    """The factor that keeps the mean of what `keep_bits` masks."""
    return LEVELS / (LEVELS - _dropped(p))


def _dropped(p: float) -> int:
    return min(round(p * LEVELS), LEVELS - 1)


def masked(values: Tensor, bits: Tensor, out: Tensor | None = None) -> Tensor:
    """`values` where `bits` (as many elements) are set, else 0; into `out` if given."""
    flat = values.view(bits.dtype)
    return torch.bitwise_and(flat, bits.view(flat.shape), out=None if out is None else out.view(bits.dtype)).view(
        values.dtype
    )


class _Drop(torch.autograd.Function):
    """Dropout with bits for a mask."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, p: float) -> Tensor:
        bits = keep_bits(values.numel(), p, values.dtype)
        ctx.save_for_backward(bits)
        ctx.scale = keep_scale(p)
        return masked(values, bits).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return masked(grad, *ctx.saved_tensors).mul_(ctx.scale), None


class CheapDropout(nn.Dropout):
    """`nn.Dropout`, which draws as `keep_bits` does where the input is on a CPU, and whose rate may change at any time.

    In a compiled graph the rate is read from a buffer, so that one graph serves all rates. `p` reads as 0 there:
    attention, to which transformers passes it, reads `host_rate` in a graph, and calls `rate_of` outside of it.
    """

    rate: Tensor
    host_rate: Tensor  # no buffer: it stays on the host, where compiled attention reads it without waiting

    @property
    def p(self) -> float:
        """Probability with which an element is dropped."""
        return 0.0 if torch.compiler.is_compiling() else self._p

    @p.setter
    def p(self, value: float) -> None:
        self._p = float(value)
        if not hasattr(self, "rate"):
            self.register_buffer("rate", torch.empty(()), persistent=False)
            # Lightning builds modules under `with device`
            self.host_rate = torch.empty((), dtype=torch.float64, device="cpu")
        self.rate.fill_(value)
        self.host_rate.fill_(value)

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of `input` (any shape) in train mode."""
        if not self.training:
            return input
        if torch.compiler.is_compiling():
            kept = torch.rand_like(input, dtype=torch.float32) >= self.rate
            return input * (kept / (1 - self.rate)).to(input.dtype)
        if self._p == 0:
            return input
        if input.device.type != "cpu" or self._p == 1:
            return F.dropout(input, self._p)
        return _Drop.apply(input, self._p)


def use_cheap_dropout(model: nn.Module) -> None:
    """Turn every `nn.Dropout` of a model into a `CheapDropout`, in place; no key of its state changes."""
    for module in model.modules():
        if type(module) is nn.Dropout and not module.inplace:
            value = vars(module).pop("p")
            module.__class__ = CheapDropout
            module.p = value


def rate_of(attention: nn.Module, default: float) -> float:
    """The rate at which an attention layer drops weights now: that of its dropout module, else the default."""
    dropout = getattr(attention, "dropout", None)
    if isinstance(dropout, CheapDropout):
        return dropout.p if attention.training else 0.0
    return default
