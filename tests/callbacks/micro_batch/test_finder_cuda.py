"""The micro-batch size and what follows an OOM, on a GPU whose memory this process may fill in part only."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_bge.callbacks.micro_batch.config import MemoryConfig
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.optimizer import OptimizerConfig
from lightning_bge.runtime.memory import release
from lightning_bge.runtime.oom import find_oom
from lightning_bge.types import Batch, Schema
from tests.helpers.small_models import Loader, cut_batch, quiet_trainer, random_sequences, save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTH = 128
SCHEMA = Schema("binary", ("no", "yes"), ("first", "second"), LENGTH)
SHAPE = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
ROOM = 2**30  # bytes


@pytest.fixture
def limit() -> Iterator[None]:
    """1 GiB for this process, whatever the GPU has; all of it again afterwards."""
    release()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(ROOM / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        release()


def make_batch(sequences: int, seed: int = 0) -> Batch:
    """One micro-batch of the longest sequences."""
    drawn = random_sequences([LENGTH] * sequences, vocabulary=40, seed=seed)
    return cut_batch(drawn, torch.arange(sequences) % 2.0, 1)


class Data(LightningDataModule):
    """Worst cases: ten that must fit and one that must not, each one made when it is wanted."""

    micro_batch_size_step = LENGTH
    schema, class_counts = SCHEMA, None
    micro_batch_size = LENGTH

    def worst_case_batch(self, size: int, train: bool) -> Batch:
        return make_batch(-(-size // LENGTH) * (1 if train else 2))

    def set_micro_batch_size(self, size: int) -> None:
        self.micro_batch_size = size

    def train_dataloader(self) -> Any:
        data = self

        class Source(Loader):
            def __iter__(self) -> Iterator[Batch]:
                for factor in self.batches:
                    yield data.worst_case_batch(round(data.micro_batch_size * factor), train=True)

        return Source([1.0] * 10 + [1.35])

    def val_dataloader(self) -> Any:
        data = self

        class Source(Loader):
            def __iter__(self) -> Iterator[Batch]:
                yield data.worst_case_batch(data.micro_batch_size, train=False)

        return Source([0])


def make_module(folder: str) -> BGEClassifier:
    torch.manual_seed(0)
    return BGEClassifier(folder, dropout=0.0, optimizer=OptimizerConfig(lr=1e-3))


def on_gpu(precision: str, *callbacks: Any, **options: Any) -> Any:
    return quiet_trainer(accelerator="cuda", devices=1, precision=precision, callbacks=list(callbacks), **options)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_answer_holds_and_a_larger_one_does_not(tmp_path: Path, limit: None, precision: str) -> None:
    module, data = make_module(save_model(tmp_path, max_position_embeddings=LENGTH, **SHAPE)), Data()
    finder = MicroBatchFinder(MemoryConfig(min_speedup=None, cache=False))
    trainer = on_gpu(precision, finder, val_check_interval=5)
    with pytest.raises(RuntimeError) as caught, module.trial_steps():  # which lets errors out
        trainer.fit(module, datamodule=data)
    record = find_oom(caught.value)
    assert record is not None, caught.value
    assert trainer.fit_loop.epoch_loop.batch_idx == 10
    assert "(torch.cuda.set_per_process_memory_fraction)" in finder.reason
    assert data.micro_batch_size == finder.micro_batch_size > 8 * LENGTH


def train(folder: str, sequences: int) -> tuple[dict[str, Tensor], list[Any]]:
    """Three steps; the weights, on the host, and what was noted."""
    module = make_module(folder)
    batches = Loader([make_batch(sequences, seed) for seed in range(3)])
    module.set_schema(SCHEMA)
    on_gpu("32-true", limit_val_batches=0).fit(module, batches)
    return {name: value.cpu() for name, value in module.state_dict().items()}, module.oom_retry.records


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_a_step_recovers_from_a_real_oom(tmp_path: Path) -> None:
    folder = save_model(tmp_path, max_position_embeddings=LENGTH, **SHAPE)
    train(folder, 2)  # what the libraries keep for good
    gc.collect()
    release()
    baseline = torch.cuda.memory_allocated()
    expected, records = train(folder, 512)
    assert records == []
    gc.collect()
    release()
    assert torch.cuda.memory_allocated() == baseline
    torch.cuda.set_per_process_memory_fraction(ROOM / torch.cuda.mem_get_info()[1])
    try:
        found, records = train(folder, 512)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert records
    assert records[0].where in ("forward", "backward")
    assert records[0].requested is not None
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() <= 1e-4 * max(1.0, float(weight.abs().max())), name
    gc.collect()
    release()
    assert torch.cuda.memory_allocated() == baseline
