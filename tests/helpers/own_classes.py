"""A loss, optimizer and schedule of a user, and others that can't serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class SquaredHinge(nn.Module):
    """Of labels 0 and 1, with a buffer."""

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("margin", torch.tensor(margin))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (self.margin - (2 * labels - 1) * logits).clamp(min=0) ** 2


class CentredLoss(nn.Module):
    """One whose values depend on the other rows."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits - logits.mean() - labels) ** 2


class LearnedLoss(SquaredHinge):
    """One with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class SignDescent(Optimizer):
    """Steps of equal size, with a state that has no `step`."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter].setdefault("mean", torch.zeros_like(parameter)).lerp_(parameter.grad, 0.5)
                    parameter.sub_(self.state[parameter]["mean"].sign(), alpha=group["lr"])


class Triangle(LambdaLR):
    """Up to the middle of a run, and down."""

    def __init__(self, optimizer: Optimizer, num_training_steps: int) -> None:
        super().__init__(optimizer, lambda step: 1 - abs(2 * step / num_training_steps - 1))
