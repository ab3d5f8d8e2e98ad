"""How a batch gets to the device, in a training step that waits for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.effective_batch import _seed
from lightning_bge.models.optimizer import OptimizerConfig
from lightning_bge.types import Batch, Schema
from tests.helpers.small_models import Batches, micro_batch, quiet_trainer, random_sequences, save_model

BINARY = Schema("binary", ("no", "yes"), ("a",), 32)
BY_DEVICE = [("cuda", True), ("mps", False), ("meta", False)]


def example(number: int = 0) -> Batch:
    """Two micro-batches."""
    parts = (random_sequences(lengths, 45, number) for lengths in ((9, 7), (5, 4, 4)))
    return Batch(tuple(micro_batch(part, torch.ones(len(part)), token_types=True) for part in parts))


class Copies(TorchDispatchMode):
    """Whether each copy to a device that torch makes is a non-blocking one."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.non_blocking = device, list[bool]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs["device"].type == self.device:
            self.non_blocking.append(kwargs.get("non_blocking", False))
        return func(*args, **kwargs)


@pytest.mark.parametrize(("device", "non_blocking"), BY_DEVICE)
def test_lightning_copies_a_batch_without_waiting_to_cuda_alone(
    tmp_path: Path, device: str, non_blocking: bool
) -> None:
    module = BGEClassifier(save_model(tmp_path))
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(module, datamodule=Batches(BINARY, [example()]))
    batch = example()
    with FakeTensorMode(allow_non_fake_inputs=True), Copies(device) as copies:
        moved = trainer.strategy.batch_to_device(batch, torch.device(device, 0))
    assert copies.non_blocking == [non_blocking] * 10  # five tensors of each micro-batch
    assert [micro.input_ids.device.type for micro in moved.micro] == [device] * 2
    assert [micro.rows.device.type for micro in moved.micro] == ["cpu"] * 2


class NoWaiting(BGEClassifier):
    """From the third step on, whatever waits for the device is an error, from a batch's copy to the step's end."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.watched = 0

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if self.global_step >= 2:
            self.watched += 1
            torch.cuda.set_sync_debug_mode("error")
        return batch

    def on_train_batch_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def default_sync_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("default_sync_mode")
@pytest.mark.filterwarnings("ignore:You have overridden `on_before_batch_transfer`")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "32-true"])
def test_gpu_neither_a_batch_s_copy_nor_its_step_waits_for_the_device(tmp_path: Path, precision: Any) -> None:
    module = NoWaiting(save_model(tmp_path, dropout=0.2), optimizer=OptimizerConfig(lr=1e-2))
    trainer: Trainer = quiet_trainer(accelerator="gpu", devices=1, precision=precision, limit_val_batches=0)
    trainer.fit(module, datamodule=Batches(BINARY, [example(number).pin_memory() for number in range(6)]))
    assert (trainer.global_step, module.watched) == (6, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("default_sync_mode")
def test_gpu_a_copy_that_waits_is_an_error_of_that_test() -> None:
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        example().pin_memory().to("cuda", non_blocking=False)


def test_the_generator_of_mps_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.mps, "manual_seed", seeds.append)
    with torch.random.fork_rng(devices=[]):
        for device in ("cpu", "mps"):
            _seed(torch.device(device), 7)
    assert seeds == [7]
