"""`OOMHandler` in a project that knows nothing of ours, and beside our own module's ladder."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_bge.callbacks.oom import OOMHandler, drop_locals
from lightning_bge.runtime.memory import OutOfMemory, find_oom, live_bytes

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


def fit(module: BoringModel, data: Data, recorder: OOMHandler) -> None:
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[recorder],
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
    data, recorder = Data(error if place == "data" else None), OOMHandler()
    module = Hungry(place, error)
    before = live_bytes()
    with caplog.at_level(logging.WARNING), pytest.raises(torch.OutOfMemoryError) as caught:
        fit(module, data, recorder)
    assert caught.value is error
    [record] = recorder.records
    assert record == OutOfMemory(place, "device", 2**30, 4 * 2**20, TEXT)
    assert find_oom(caught.value, "elsewhere") == record
    assert data.micro_batch_size == 4
    assert (
        f"out of memory in {place}: 1.0 GiB asked, 4.0 MiB were free: the micro-batch size is 4 from now on"
        in caplog.text
    )
    assert all(parameter.grad is None for parameter in module.parameters())
    assert live_bytes() - before < 10**5  # though the error, and so its traceback, is still at hand


def test_other_errors_are_left_alone() -> None:
    data, recorder = Data(), OOMHandler()
    with pytest.raises(RuntimeError, match="shape mismatch"):
        fit(Hungry("forward", RuntimeError("shape mismatch")), data, recorder)
    assert recorder.records == []
    assert data.micro_batch_size == 8


def test_a_killed_worker_lowers_nothing() -> None:
    data, recorder = Data(), OOMHandler()
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match="killed"):
        fit(Hungry("forward", error), data, recorder)
    assert recorder.records[0].kind == "worker"
    assert data.micro_batch_size == 8


def test_the_next_fit_begins_anew() -> None:
    recorder = OOMHandler()
    with pytest.raises(MemoryError):
        fit(Hungry("forward", MemoryError()), Data(), recorder)
    fit(BoringModel(), Data(), recorder)
    assert recorder.records == []


class OOMRetry:
    """As our module has one."""

    def __init__(self) -> None:
        self.records: list[OutOfMemory] = []
        self.limit: int | None = None


class Repeating(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.ladder = OOMRetry()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 1:
            self.ladder.records.append(OutOfMemory("forward", "device", 1, 1, "text"))
            self.ladder.limit = 3
        return super().training_step(batch, batch_idx)


def test_what_a_module_has_found_for_itself_is_handed_on() -> None:
    data, recorder = Data(), OOMHandler()
    fit(Repeating(), data, recorder)
    assert len(recorder.records) == 1
    assert data.micro_batch_size == 3


def test_locals_of_what_led_to_an_error_go_too() -> None:
    def inner() -> None:
        held = torch.ones(10**6)
        raise MemoryError(str(held.shape))

    def outer() -> None:
        try:
            inner()
        except MemoryError as error:
            held = torch.ones(10**6)
            raise ValueError(str(held.shape)) from error

    before = live_bytes()
    with pytest.raises(ValueError, match="1000000") as caught:
        outer()
    assert live_bytes() - before == 8 * 10**6
    drop_locals(caught.value)
    assert live_bytes() == before
