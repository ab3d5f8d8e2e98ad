"""Modules with a stack of layers, and measurements to give out, for tests of the compile callback."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_bge.callbacks.compile import callback as compile_module
from lightning_bge.callbacks.compile import policy as policy_module
from lightning_bge.callbacks.compile.policy import (
    CompileConfig,
    Findings,
)
from lightning_bge.callbacks.compile.probe import (
    Capture,
    Measured,
)
from lightning_bge.runtime.compat.torch import compiled_call
from tests.helpers.small_models import Loader, quiet_trainer

EAGER = CompileConfig(policy="always", backend="eager")


class Block(nn.Module):
    """A layer with all that a probe might disturb: random numbers, and buffers that change in training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.word = ""

    def forward(self, hidden: Tensor, *, factor: Tensor | None = None) -> Tensor:
        out = self.dropout(self.norm(self.linear(hidden))) + len(self.word)
        return hidden + (out if factor is None else out * factor)


class Stack(LightningModule):
    """A module as anybody writes it."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.heads = nn.ModuleList([nn.Linear(6, 1), nn.Identity()])

    def forward(self, batch: Tensor) -> Tensor:
        for layer in self.layers:
            batch = layer(batch, factor=batch.mean())
        return self.heads[0](batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Slow(Stack):
    """2 s a training batch on a clock that stands still otherwise, but for 50 s a validation batch."""

    now = 100.0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        Slow.now += 2
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        Slow.now += 50


def train(module: LightningModule, *callbacks: Callback, steps: int = 20, **options: Any) -> Trainer:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4 + number % 3, 6, generator=generator) for number in range(steps)]
    trainer = quiet_trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, Loader(batches), Loader(batches[:2]))
    return trainer


def stack(kind: type[Stack] = Stack, seed: int = 3) -> Stack:
    torch.manual_seed(seed)
    return kind()


def compiled(module: Stack) -> list[bool]:
    return [compiled_call(layer) is not None for layer in module.layers]


def fake(monkeypatch: pytest.MonkeyPatch, *results: Measured | BaseException) -> list[float]:
    """Measurements to give out, one a call; returns the list of the time limits that were asked for."""
    limits: list[float] = []
    left = list(results)

    def measure_(capture: Capture, compile_: Any, time_limit: float, clock: Any) -> Measured:
        assert len(capture.calls) == 1
        limits.append(time_limit)
        if isinstance(result := left.pop(0), Measured):
            return result
        raise result

    monkeypatch.setattr(compile_module, "measure", measure_)
    # a few steps of the fake clock are worth a try, for a sixth of what is left
    monkeypatch.setattr(policy_module, "MIN_PROBE_S", 0.0)
    monkeypatch.setattr(policy_module, "MAX_PROBE_SHARE", 1 / 6)
    return limits


def findings(**changes: Any) -> Findings:
    return Findings(**{"layers": 3, "graphs": 2, "step_s": 0.031, **changes})
