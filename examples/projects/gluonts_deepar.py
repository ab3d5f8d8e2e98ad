"""Noisy waves for DeepAR of GluonTS: a data module for gluonts_deepar.yaml."""

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

PAST, FUTURE = 48, 12  # with the lags of the configuration


class Waves(LightningDataModule):
    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size
        random = torch.Generator().manual_seed(0)
        at, phase, speed = torch.arange(PAST + FUTURE), *torch.rand(2, 240, 1, generator=random)
        values = torch.sin(at * (speed + 0.2) + 6 * phase) + 0.1 * torch.randn(240, PAST + FUTURE, generator=random)
        self.rows = [self.row(one, at / 60) for one in values]

    def row(self, values: torch.Tensor, at: torch.Tensor) -> dict[str, torch.Tensor]:
        past, future = values.split((PAST, FUTURE))
        times = at[:, None].split((PAST, FUTURE))
        targets = {"past_target": past, "future_target": future}
        observed = {"past_observed_values": torch.ones(PAST), "future_observed_values": torch.ones(FUTURE)}
        static = {"feat_static_cat": torch.zeros(1, dtype=torch.long), "feat_static_real": torch.zeros(1)}
        return targets | observed | static | {"past_time_feat": times[0], "future_time_feat": times[1]}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows[:200], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows[200:], 40)
