"""Modules, batch sources and meters for tests of the search for a micro-batch size."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from lightning_bge.callbacks.micro_batch.config import MemoryConfig
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from tests.helpers.small_models import Loader, quiet_trainer

HELD, ROW = 300, 10  # bytes of a step: gradients and the like, and of each row


class Foreign(LightningModule):
    """A module as anybody writes it, with all that trial steps might disturb. Automatically optimised."""

    def __init__(self, optimizer: Callable[..., Any] | None = None, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.frozen = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)).eval().requires_grad_(False)
        self.head = nn.Linear(6, 1)
        self.losses: list[float] = []
        self.counts: dict[str, int] = {"steps": 0}
        self.mean = torch.zeros(())
        self.largest = 1940  # rows that fit: twice what of what `FakeMeter` allows for 10,000 bytes
        self.trying = False

    @contextmanager
    def trial_steps(self) -> Iterator[None]:
        self.trying = True
        yield
        self.trying = False

    def forward(self, values: Tensor) -> Tensor:
        if len(values) > self.largest:
            self.kept_by_error = torch.empty(100)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        noise = random.random() + float(np.random.random())
        return self.head(self.frozen(self.body(values))) + noise

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self(batch).square().mean()
        self.log("loss", loss)
        self.losses.append(loss.item())
        self.counts["steps"] += 1
        self.mean += loss.detach()
        self.lazy = len(batch)
        if self.automatic_optimization:
            return {"loss": loss}
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        self.manual_backward(loss)
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        scheduler.step()  # type: ignore[union-attr, call-arg]
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.log("val", self(batch).mean())

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        # refuses to be stepped beyond its end
        return [optimizer], [
            torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12, cycle_momentum=False)
        ]


class Rows(LightningDataModule):
    """A batch source of rows."""

    def __init__(self, step: int = 2, **attributes: Any) -> None:
        super().__init__()
        self.micro_batch_size_step, self.micro_batch_size, self.set, self.made = step, 4, [], []
        vars(self).update(attributes)

    def worst_case_batch(self, size: int, train: bool) -> Tensor:
        self.made.append(size)
        return torch.ones(size * (1 if train else 2), 6)

    def set_micro_batch_size(self, size: int) -> None:
        self.micro_batch_size = size
        self.set.append(size)

    def train_dataloader(self) -> Loader:
        generator = torch.Generator().manual_seed(1)
        return Loader([torch.randn(4, 6, generator=generator) for _ in range(6)])

    val_dataloader = train_dataloader


class FakeMeter:
    """Measures a clock and a memory that go by the batches that were asked for."""

    noise = 0

    def __init__(self, data: Rows) -> None:
        self.data, self.seconds = data, 0.0

    def start(self) -> None:
        pass

    def peak(self) -> int:
        return HELD + ROW * self.data.made[-1]

    def now(self) -> float:
        self.seconds += 0.1 * self.data.made[-1]
        return self.seconds


class SimpleCache:
    def __init__(self, capacity: int, nbytes: int) -> None:
        self.capacity, self.nbytes = capacity, nbytes

    def shrink(self) -> None:
        self.nbytes = 0


Use = Callable[..., None]


def train(module: LightningModule, data: LightningDataModule, *callbacks: Callback, **options: Any) -> Trainer:
    trainer = quiet_trainer(callbacks=list(callbacks), **{"max_epochs": 2, "gradient_clip_val": 1.0, **options})
    trainer.fit(module, datamodule=data)
    return trainer


ALL = MemoryConfig(min_speedup=None)


class Losses(Callback):
    """The losses and modes of the real steps."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        modes = [part.training for part in pl_module.modules()]
        loss = pl_module.losses[-1] if hasattr(pl_module, "losses") else pl_module._losses[-1].item()
        self.seen.append((trainer.global_step, loss, modes, torch.rand(1).item(), random.random(), np.random.rand()))


def everything(module: LightningModule, trainer: Trainer) -> dict[str, Any]:
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    return {
        "weights": module.state_dict(),
        "optimizers": optimizers,
        "schedulers": [{k: v for k, v in state.items() if not callable(v)} for state in schedulers],
        "steps": trainer.global_step,
        "loops": trainer.fit_loop.state_dict(),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "attributes": sorted(set(vars(module)) - {"_forward_hooks"}),
    }


def assert_same(some: Any, others: Any, at: str = "") -> None:
    assert type(some) is type(others), at
    if isinstance(some, Tensor):
        assert torch.equal(some, others), at
    elif isinstance(some, dict):
        assert list(some) == list(others), at
        for key in some:
            assert_same(some[key], others[key], f"{at}.{key}")
    elif isinstance(some, list | tuple):
        assert len(some) == len(others), at
        for number, (one, other) in enumerate(zip(some, others, strict=True)):
            assert_same(one, other, f"{at}[{number}]")
    elif not callable(some) and type(some).__module__ == "builtins":
        assert some == others, at


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),  # its state is there from the start
}


def search(use: Use, folder: Path | None = None, total: int = 10_000, **changes: Any) -> tuple[Rows, MicroBatchFinder]:
    data = changes.pop("data", None) or Rows()
    finder = MicroBatchFinder(changes.pop("config", ALL), cache_dir=folder)
    use(data, total)
    train(changes.pop("module", None) or Foreign(), data, finder, **changes)
    return data, finder
