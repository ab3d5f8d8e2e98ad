"""A run that is interrupted after any step resumes with exactly the batches that it would have seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lightning_bge.data.batches.config import BatchingConfig
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.tables.splits import SplitConfig
from lightning_bge.types import Batch

EPOCHS, BATCHES = 3, 4

# Inside Lightning 2.6.6, with torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


class Recorder(LightningModule):
    """Notes the rows of every batch, and a random number a step, as dropout would draw it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, list[int]]] = []
        self.draws: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.seen.append((self.current_epoch, [row for micro in batch.micro for row in micro.rows.tolist()]))
        self.draws.append(torch.rand(()).item())
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.weight.sum().backward()
        optimizer.step()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEachStep(Callback):
    def __init__(self, folder: Path, random: dict[str, torch.Tensor]) -> None:
        self.folder, self.random = folder, random

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.save(trainer, f"step{trainer.global_step}")

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        self.save(trainer, f"epoch{trainer.current_epoch}")

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        self.save(trainer, f"val{trainer.global_step}")

    def save(self, trainer: Trainer, name: str) -> None:
        trainer.save_checkpoint(self.folder / f"{name}.ckpt", weights_only=False)
        self.random[name] = torch.get_rng_state()


class RestoreRandom(Callback):
    def __init__(self, state: torch.Tensor) -> None:
        self.state = state

    def on_train_start(self, *args: Any) -> None:
        torch.set_rng_state(self.state)


def run(
    data: dict[str, Any], validate: bool, callback: Callback | None = None, checkpoint: Path | None = None
) -> Recorder:
    module = Recorder()
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if validate else 0,
        val_check_interval=2 if validate else None,
        callbacks=[callback] if callback else [],
    )
    torch.manual_seed(0)
    trainer.fit(module, datamodule=TextDataModule(**data), ckpt_path=checkpoint, weights_only=True)
    return module


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
def test_resumed_run_sees_the_rest(
    tokenizer_dir: str, pairs_file: Path, tmp_path: Path, validate: bool, balanced: bool
) -> None:
    data = {
        "tokenizer": tokenizer_dir,
        "train_file": str(pairs_file),
        "split": SplitConfig(folds=3),
        "batch_size": 11,
        "cache_dir": str(tmp_path / "cache"),
        "batching": BatchingConfig(max_tokens=50, balanced=balanced),
    }
    random: dict[str, torch.Tensor] = {}
    whole = run(data, validate, SaveEachStep(tmp_path, random))
    assert len(whole.seen) == EPOCHS * BATCHES
    assert len({tuple(rows) for _, rows in whole.seen}) == EPOCHS * BATCHES
    for name in random:
        number = int(name.lstrip("stepochval"))
        done = (number + 1) * BATCHES if name.startswith("epoch") else number
        resumed = run(data, validate, RestoreRandom(random[name]), tmp_path / f"{name}.ckpt")
        assert resumed.seen == whole.seen[done:], name
        assert resumed.draws == whole.draws[done:], name


def test_workers_resume_too(tokenizer_dir: str, pairs_file: Path, tmp_path: Path) -> None:
    data = {
        "tokenizer": tokenizer_dir,
        "train_file": str(pairs_file),
        "split": SplitConfig(folds=3),
        "batch_size": 11,
        "cache_dir": str(tmp_path / "cache"),
    }
    random: dict[str, torch.Tensor] = {}
    whole = run(data, False, SaveEachStep(tmp_path, random))
    checkpoint = tmp_path / f"step{BATCHES + 2}.ckpt"
    resumed = run({**data, "batching": BatchingConfig(num_workers=1)}, False, None, checkpoint)
    assert resumed.seen == whole.seen[BATCHES + 2 :]
