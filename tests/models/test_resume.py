"""A run resumed from a checkpoint ends with the weights of an uninterrupted run, with dropout as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_bge.data.batches.config import BatchingConfig
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.tables.splits import SplitConfig
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.optimizer import OptimizerConfig
from tests.helpers.pairs_file import write_pairs
from tests.helpers.small_models import quiet_trainer, save_model


class SaveAll(Callback):
    """A checkpoint at every place where Lightning's own callback may write one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, trainer: Trainer, name: str) -> None:
        trainer.save_checkpoint(self.folder / f"{name}{trainer.global_step}.ckpt", weights_only=False)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.save(trainer, "step")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.save(trainer, "epoch")


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), rows=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), dropout=0.2)


@pytest.fixture
def make_data(train_file: str, folder: str, tmp_path: Path) -> Callable[[], TextDataModule]:
    """20 training rows in 3 batches of up to 8, each of several micro-batches."""

    def make() -> TextDataModule:
        return TextDataModule(
            tokenizer=folder,
            train_file=train_file,
            max_length=32,
            batch_size=8,
            cache_dir=str(tmp_path / "cache"),
            split=SplitConfig(folds=3),
            batching=BatchingConfig(max_tokens=64),
        )

    return make


def test_resumed_run_ends_with_the_same_weights(
    folder: str, make_data: Callable[[], TextDataModule], tmp_path: Path
) -> None:
    def run(checkpoint: Path | None = None, callbacks: Sequence[Callback] = ()) -> tuple[dict[str, Tensor], Trainer]:
        module = BGEClassifier(folder, optimizer=OptimizerConfig(lr=1e-2))
        trainer = quiet_trainer(max_epochs=2, callbacks=list(callbacks))
        trainer.fit(module, datamodule=make_data(), ckpt_path=checkpoint, weights_only=True)
        return module.net.model.state_dict(), trainer

    whole, _ = run(callbacks=[SaveAll(tmp_path)])
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert {path.stem for path in checkpoints} == {
        *(f"step{step}" for step in range(1, 7)),
        *(f"{name}{step}" for name in ("validation", "epoch") for step in (3, 6)),
    }
    for checkpoint in checkpoints:
        resumed, trainer = run(checkpoint)
        assert trainer.global_step == 6, checkpoint.stem
        assert all(torch.equal(value, whole[name]) for name, value in resumed.items()), checkpoint.stem
