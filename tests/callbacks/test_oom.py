"""`OOMHandler` in a project that uses nothing else of this package."""

from __future__ import annotations

import logging
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_bge.callbacks.micro_batch import cache
from lightning_bge.callbacks.micro_batch.cache import FoundSize
from lightning_bge.callbacks.micro_batch.config import MemoryConfig
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.callbacks.oom import OOMHandler
from lightning_bge.callbacks.throughput.monitor import Throughput
from lightning_bge.runtime.memory import live_bytes
from lightning_bge.runtime.oom import OutOfMemory, find_oom

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")

TEXT = (
    "CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 4.00 MiB is free."
)


class Hungry(BoringModel):
    """Runs out of memory at one place of its second step, with 4 MB in its hands."""

    def __init__(self, place: str, error: Exception) -> None:
        super().__init__()
        self.place, self.error = place, error

    def fail(self, place: str) -> None:
        if place == self.place and self.trainer.fit_loop.epoch_loop.batch_idx == 1:
            held = torch.ones(10**6)
            raise self.error if held.sum() else AssertionError

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.fail("forward")
        return super().training_step(batch, batch_idx)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.fail("backward")
        super().backward(loss, *args, **kwargs)

    def configure_optimizers(self) -> Any:
        return Failing(self) if self.place == "optimizer" else torch.optim.SGD(self.parameters(), lr=0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if self.place == "validation":
            raise self.error
        return super().validation_step(batch, batch_idx)


class Failing(torch.optim.SGD):
    def __init__(self, module: Hungry) -> None:
        super().__init__(module.parameters(), lr=0.1)
        self.module = module

    def step(self, closure: Any = None) -> None:
        closure()
        self.module.fail("optimizer")


class Data(LightningDataModule):
    """Batches of `micro_batch_size` rows."""

    def __init__(self, fails: Exception | None = None) -> None:
        super().__init__()
        self.micro_batch_size, self.fails = 8, fails

    def set_micro_batch_size(self, size: int) -> None:
        self.micro_batch_size = size

    def collate(self, rows: list[Tensor]) -> Tensor:
        if self.fails is not None and self.trainer.global_step == 1:
            raise self.fails
        return torch.stack(rows)

    def train_dataloader(self) -> Any:
        return DataLoader(RandomDataset(32, 64), batch_size=self.micro_batch_size, collate_fn=self.collate)

    def val_dataloader(self) -> Any:
        return DataLoader(RandomDataset(32, 8), batch_size=self.micro_batch_size)


def fit(module: BoringModel, data: Data, *callbacks: Callback) -> None:
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)


@pytest.mark.parametrize("place", ["forward", "backward", "optimizer", "validation", "data"])
def test_notes_frees_lowers_and_lets_the_error_out(place: str, caplog: pytest.LogCaptureFixture) -> None:
    error = torch.OutOfMemoryError(TEXT)
    data, handler = Data(error if place == "data" else None), OOMHandler()
    module = Hungry(place, error)
    before = live_bytes()
    with caplog.at_level(logging.WARNING), pytest.raises(torch.OutOfMemoryError) as caught:
        fit(module, data, handler)
    assert caught.value is error
    [record] = handler.records
    assert record == OutOfMemory(place, "device", 2**30, 4 * 2**20, TEXT)
    assert find_oom(caught.value, "elsewhere") == record
    assert data.micro_batch_size == 4
    assert (
        f"out of memory in {place}: 1.0 GiB requested, 4.0 MiB were free: the micro-batch size is 4 from now on"
        in caplog.text
    )
    assert all(parameter.grad is None for parameter in module.parameters())
    assert live_bytes() - before < 10**5  # though the error, and so its traceback, is still at hand


def test_other_errors_are_left_alone() -> None:
    data, handler = Data(), OOMHandler()
    with pytest.raises(RuntimeError, match="shape mismatch"):
        fit(Hungry("forward", RuntimeError("shape mismatch")), data, handler)
    assert handler.records == []
    assert data.micro_batch_size == 8


def test_a_killed_worker_lowers_nothing() -> None:
    data, handler = Data(), OOMHandler()
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match="killed"):
        fit(Hungry("forward", error), data, handler)
    assert handler.records[0].kind == "worker"
    assert data.micro_batch_size == 8


def test_the_next_fit_begins_anew() -> None:
    handler = OOMHandler()
    with pytest.raises(MemoryError):
        fit(Hungry("forward", MemoryError()), Data(), handler)
    fit(BoringModel(), Data(), handler)
    assert handler.records == []


class SizedData(Data):
    """A batch source for `MicroBatchFinder` too."""

    def worst_case_batch(self, micro_batch_size: int, train: bool) -> Tensor:
        return torch.ones(micro_batch_size, 32)


class Stops(Callback):
    """A callback that fails on its own where the run ends by an error."""

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        pl_module.layer = None


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_the_order_of_callbacks_changes_nothing(
    order: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.forget()
    handler, finder = OOMHandler(), MicroBatchFinder(MemoryConfig(min_speedup=None), cache_dir=tmp_path)
    monkeypatch.setattr(finder, "_find", lambda *_: FoundSize(16, "found"))
    known = [handler, finder, Stops(), Throughput(count=lambda batch: (len(batch), len(batch)))]
    before, data, error = live_bytes(), SizedData(), torch.OutOfMemoryError(TEXT)
    with pytest.raises(torch.OutOfMemoryError):
        fit(Hungry("forward", error), data, *[known[index] for index in order])
    assert [record.where for record in handler.records] == ["forward"]
    assert (data.micro_batch_size, finder.micro_batch_size) == (8, 8)
    assert finder.reason == "lowered from 16 after an OOM"
    assert live_bytes() - before < 10**5
    cache.forget()  # what this process knows, but not the file
    data, finder = SizedData(), MicroBatchFinder(MemoryConfig(min_speedup=None), cache_dir=tmp_path)
    monkeypatch.setattr(finder, "_find", lambda *_: pytest.fail("the lower size was not kept"))
    fit(Hungry("nowhere", error), data, finder)
    assert data.micro_batch_size == 8
