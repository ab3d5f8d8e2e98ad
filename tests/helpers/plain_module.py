"""A module as anybody writes it, and batches as a tokenizer of transformers makes them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from tests.helpers.small_models import Loader, quiet_trainer

SIZES = (4, 4, 2)


def dict_batches() -> list[dict[str, Tensor]]:
    """As a tokenizer of transformers makes them: padded, with a mask; 10 sequences of 5, 4 and 3 real tokens."""
    batches = []
    for size in SIZES:
        mask = torch.zeros(size, 6, dtype=torch.long)
        mask[:, :3] = 1
        mask[0, :5] = 1
        mask[1, :4] = 1
        batches.append({"input_ids": torch.ones(size, 6), "attention_mask": mask})
    return batches


TOKENS = sum(int(batch["attention_mask"].sum()) for batch in dict_batches())


class Plain(LightningModule):
    """A module as anybody writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))
        self.frozen = nn.Sequential(nn.Sequential(nn.Dropout(0.5)), nn.Dropout(0.5))
        self.frozen_too = nn.Dropout(0.5)
        self.head = nn.Linear(6, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        values = batch["input_ids"] if isinstance(batch, dict) else batch
        return self.head(self.frozen(self.encoder(values))).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert not self.encoder.training

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


PARAMETERS = 6 * 6 + 6 + 6 + 1


def train(module: LightningModule, *callbacks: Callback, batches: list[Any] | None = None, **options: Any) -> Trainer:
    trainer = quiet_trainer(callbacks=list(callbacks), **options)
    loader = Loader(dict_batches() if batches is None else batches)
    trainer.fit(module, loader, loader)
    return trainer
