"""A project of another user without any defect, with an argument for each defect that an audit has to find."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForSequenceClassification

WIDTH = 24


class Texts(Dataset[dict[str, Tensor]]):
    """Token ids of 4 to `longest` real tokens; longest first within a stretch of 8, so that little is padded."""

    def __init__(self, rows: int = 96, longest: int = 20, sleep: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 200, (rows, longest), generator=generator)
        lengths = torch.randint(4, longest + 1, (rows,), generator=generator)
        self.lengths = torch.cat([part.sort(descending=True).values for part in lengths.sort().values.split(8)])
        self.sleep = sleep

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if self.sleep:
            time.sleep(self.sleep)
        return {"ids": self.ids[row, : self.lengths[row]], "label": torch.tensor(row % 2)}


def collate(rows: list[dict[str, Tensor]], width: int | None = None) -> dict[str, Tensor]:
    """Padded to the longest of the batch, or to `width`."""
    ids = nn.utils.rnn.pad_sequence([row["ids"] for row in rows], batch_first=True)
    if width is not None:
        ids = nn.functional.pad(ids, (0, width - ids.shape[1]))
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.stack([row["label"] for row in rows])}


def loader(batch_size: int = 8, rows: int = 96, width: int | None = None, sleep: float = 0.0, **options: Any) -> Any:
    """A loader of `Texts`."""
    return DataLoader(Texts(rows, sleep=sleep), batch_size=batch_size, collate_fn=Collate(width), **options)


class Collate:
    """`collate` as an object that can be sent to workers."""

    def __init__(self, width: int | None) -> None:
        self.width = width

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return collate(rows, self.width)


class Classifier(L.LightningModule):
    """A BERT of two layers with Lightning's automatic optimization.

    Args:
        attention: of transformers.
        dropout: all of its rates.
        fused: the optimizer's.
        width: of its layers.
        hparams: the project's hyperparameters.
    """

    def __init__(
        self, attention: str = "sdpa", dropout: float = 0.1, fused: bool = True, width: int = 32, **hparams: Any
    ) -> None:
        super().__init__()
        self.save_hyperparameters(hparams)
        config = BertConfig(
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * width,
            vocab_size=200,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        torch.manual_seed(0)
        self.net = BertForSequenceClassification(config)
        self.net.set_attn_implementation(attention)
        self.fused = fused

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(**batch).loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=self.fused, foreach=None if self.fused else True)


class Accumulating(Classifier):
    """The same with manual optimization: a step for `every` batches, and one for the rest of an epoch."""

    def __init__(self, every: int = 2, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization, self.every = False, every

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / self.every)
        if (batch_idx + 1) % self.every == 0 or self.ends(batch_idx):
            optimizer.step()
            optimizer.zero_grad()

    def ends(self, batch_idx: int) -> bool:
        return self.trainer.is_last_batch
