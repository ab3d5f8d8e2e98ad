"""Dropout whose random numbers cost little on a CPU.

There a step of a small encoder spends a sixth of its time drawing one random float for each element: torch's generator
is serial. Here each 64-bit draw serves four elements with 16 bits each, which fixes the probability to 1 / 65536.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 2**16


def keep_mask(shape: torch.Size | tuple[int, ...], p: float, dtype: torch.dtype) -> Tensor:
    """A mask on the CPU, 0 with probability `p`, elsewhere the factor that keeps the mean; from torch's generator.

    Args:
        shape: of the mask.
        p: probability of 0, at least 0 and below 1; rounded to a multiple of 1 / 65536.
        dtype: of the mask: that of what it is multiplied with.
    """
    size = math.prod(shape)
    dropped = round(p * LEVELS)
    draws = torch.empty((size + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[:size].view(shape) >= dropped - LEVELS // 2
    return torch.empty(shape, dtype=dtype).copy_(kept).mul_(LEVELS / (LEVELS - dropped))


class CheapDropout(nn.Dropout):
    """`nn.Dropout`, which draws as `keep_mask` does where the input is on a CPU, and whose rate may change at any time.

    In a compiled graph the rate is read from a buffer, so that one graph serves all rates; `p` reads as 0 there, as
    attention, to which transformers passes it, runs outside of the graph and asks `rate_of` instead.
    """

    rate: Tensor

    @property
    def p(self) -> float:
        """Probability with which an element is dropped."""
        return 0.0 if torch.compiler.is_compiling() else self._p

    @p.setter
    def p(self, value: float) -> None:
        self._p = float(value)
        if "rate" not in self._buffers:
            self.register_buffer("rate", torch.empty(()), persistent=False)
        self.rate.fill_(value)

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
        return input * keep_mask(input.shape, self._p, input.dtype)


def use_cheap_dropout(model: nn.Module) -> None:
    """Turn every `nn.Dropout` of a model into a `CheapDropout`, in place; no key of its state changes."""
    for module in model.modules():
        if type(module) is nn.Dropout and not module.inplace:
            value = vars(module).pop("p")
            module.__class__ = CheapDropout
            module.p = value


def rate_of(attention: nn.Module, given: float) -> float:
    """How much of its weights an attention layer drops now: as its dropout module says, else as transformers gave."""
    dropout = getattr(attention, "dropout", None)
    if isinstance(dropout, CheapDropout):
        return dropout.p if attention.training else 0.0
    return given
