"""A module and a data module of another project: automatic optimization, dropout, a schedule, shuffled rows."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ROWS = 60


class Net(LightningModule):
    """A small regression."""

    def __init__(self, width: int = 8, lr: float = 0.01, dropout: float = 0.1, note: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1))
        self.lr = lr

    def loss(self, batch: list[Tensor]) -> Tensor:
        features, targets = batch
        return nn.functional.mse_loss(self.net(features), targets)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


class Plain(Net):
    """Without optimizers, which the options name."""

    configure_optimizers = LightningModule.configure_optimizers  # type: ignore[assignment]


class Refusing(Net):
    """Its constructor refuses its arguments."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        raise ValueError("width is deprecated, use depth instead")


class Objects(Net):
    """Adds an object to its checkpoints, which depends on its hyperparameters."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["hyper_parameters"]["width"] == self.hparams["width"]
        checkpoint["object"] = nn.MSELoss()


class Split(LightningDataModule):
    """Rows with a single split."""

    def __init__(self, batch_size: int = 6) -> None:
        super().__init__()
        self.batch_size, self.fold, self.parts = batch_size, 0, 3
        features = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
        self.rows = TensorDataset(features, features[:, :1] * 2 - features[:, 1:2] ** 2)

    def part(self, held_out: bool) -> TensorDataset:
        mask = (torch.arange(ROWS) % self.parts == self.fold) == held_out
        return TensorDataset(*self.rows[mask])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.part(held_out=False), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.part(held_out=True), ROWS)


class Folds(Split):
    """The same with folds."""

    def __init__(self, batch_size: int = 6, folds: int = 2) -> None:
        super().__init__(batch_size)
        self.num_folds = self.parts = folds

    def select_fold(self, k: int) -> None:
        self.fold = k


class NoSelection(Split):
    """Folds that can't be selected."""

    num_folds = 2


class WrongNumber(Folds):
    """A number of folds that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.num_folds = "two"  # type: ignore[assignment]
