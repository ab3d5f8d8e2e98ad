"""Our callbacks in a Lightning project that uses nothing else of ours: its own module, data module and batches.

An optimizer step sees 64 rows whatever memory there is; the data module cuts them into micro-batches of as many rows as
`MicroBatchFinder` found to fit and to pay.

python examples/callbacks_in_your_project.py
"""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from lightning_bge.callbacks.compile.callback import CompileLayers
from lightning_bge.callbacks.micro_batch.config import MemoryConfig
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.callbacks.oom import OOMHandler
from lightning_bge.callbacks.throughput.monitor import Throughput
from lightning_bge.callbacks.torch_backends import TorchBackends, choose_precision
from lightning_bge.callbacks.train_mode import TrainMode

Example = dict[str, Tensor]
LONGEST = 12


class OwnModule(L.LightningModule):
    """Somebody else's module. Its encoder came out of `from_pretrained`, so it is in eval mode.

    It sums the gradients of several micro-batches itself; with one micro-batch a step it need not.
    """

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Embedding(100, 16), nn.Dropout(0.1)).eval()
        self.head = nn.Linear(16, 1)

    def forward(self, batch: Example) -> Tensor:
        mask = batch["attention_mask"].unsqueeze(-1)
        return self.head((self.encoder(batch["input_ids"]) * mask).sum(1) / mask.sum(1)).squeeze(-1)

    def training_step(self, batch: list[Example], batch_idx: int) -> None:
        optimizer = self.optimizers()
        count = sum(len(part["label"]) for part in batch)
        for part in batch:
            loss = nn.functional.binary_cross_entropy_with_logits(self(part), part["label"], reduction="sum")
            self.manual_backward(loss / count)
        optimizer.step()
        optimizer.zero_grad()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class OwnData(L.LightningDataModule):
    """A batch source that counts rows, for `MicroBatchFinder` and `OOMHandler`."""

    def __init__(self, count: int = 512) -> None:
        super().__init__()
        self.rows, self.micro_batch_size = make_rows(count), 8

    def worst_case_batch(self, micro_batch_size: int, train: bool) -> list[Example]:
        """One micro-batch of so many rows, all as long as they can get."""
        longest = {"input_ids": torch.ones(LONGEST, dtype=torch.int64), "attention_mask": torch.ones(LONGEST).bool()}
        return [default_collate([{**longest, "label": torch.tensor(1.0)}] * micro_batch_size)]

    def set_micro_batch_size(self, size: int) -> None:
        """Cut batches into micro-batches of so many rows from now on."""
        self.micro_batch_size = size

    def cut(self, rows: list[Example]) -> list[Example]:
        return [
            default_collate(rows[at : at + self.micro_batch_size]) for at in range(0, len(rows), self.micro_batch_size)
        ]

    def train_dataloader(self) -> DataLoader[Example]:
        return DataLoader(self.rows, batch_size=64, collate_fn=self.cut)


def make_rows(count: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 100, (count, LONGEST), generator=generator)
    mask = torch.arange(LONGEST) < torch.randint(4, LONGEST + 1, (count, 1), generator=generator)
    return [{"input_ids": i, "attention_mask": m, "label": (i[0] > 50).float()} for i, m in zip(ids, mask, strict=True)]


def count_batch(batch: list[Example]) -> tuple[int, Tensor]:
    """Sequences and real tokens of a list of micro-batches."""
    masks = [part["attention_mask"] for part in batch]
    return sum(len(mask) for mask in masks), torch.stack([mask.sum() for mask in masks]).sum()


def make_trainer() -> L.Trainer:
    return L.Trainer(
        max_epochs=2,
        callbacks=[
            TrainMode(),
            TorchBackends(),
            OOMHandler(),
            # 8 GiB for this process; speed counts from 32 rows on.
            MicroBatchFinder(MemoryConfig(limit_gb=8, default_size=32)),
            CompileLayers(layers=lambda module: [module.encoder]),
            Throughput(count_batch),
        ],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )


def main() -> L.Trainer:
    precision, why = choose_precision()
    print(f"precision {precision} would pay here: {why}")
    trainer, data = make_trainer(), OwnData()
    trainer.fit(OwnModule(), data)
    print(f"{trainer.callback_metrics['train_tokens_per_s']:.0f} real tokens per second")
    print(f"micro-batches of at most {data.micro_batch_size} rows")
    for callback in trainer.callbacks:
        if isinstance(callback, MicroBatchFinder | CompileLayers):
            print(f"{type(callback).__name__}: {callback.reason}")
        elif isinstance(callback, OOMHandler):
            print(f"{len(callback.records)} times out of memory")
    return trainer


if __name__ == "__main__":
    main()
