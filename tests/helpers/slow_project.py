"""A module whose batches take known seconds by a clock that nothing else moves, and rows in two folds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tests.helpers.other_project import Folds, Net


class Clock:
    """Seconds that are added."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


class SlowNet(Net):
    """2 s for each batch of training, half a second for each of validation."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        CLOCK.now += 2.0
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        CLOCK.now += 0.5
        super().validation_step(batch, batch_idx)


class SlowFolds(Folds):
    """As `Folds`, with validations of several batches."""

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.part(held_out=True), 10)


class Stream(IterableDataset[list[Tensor]]):
    """Rows without an end."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            features = torch.randn(4, generator=generator)
            yield [features, features[:1]]


class Endless(SlowFolds):
    """Trains on a stream."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Stream(), self.batch_size)
