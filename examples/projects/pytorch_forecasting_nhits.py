"""NHiTS of pytorch-forecasting on noisy waves, for `tune`, `plan` and `audit`."""

import numpy as np
import pandas as pd
from lightning.pytorch import LightningDataModule
from pytorch_forecasting import MAE, NHiTS, TimeSeriesDataSet

SPACE = {
    "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "hidden_size": {"choices": [16, 64]},
    "dropout": {"choices": [0.0, 0.2]},
}
OPTIONS = {"metric": "val_loss", "weights_only": False}  # its checkpoints hold encoders of scikit-learn


class Waves(LightningDataModule):
    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size, random, at = batch_size, np.random.default_rng(0), np.arange(72)
        waves = [np.sin(at / random.uniform(1, 4)) + random.normal(0, 0.1, 72) for _ in range(40)]
        rows = pd.DataFrame({"value": np.concatenate(waves), "at": np.tile(at, 40), "series": np.repeat(range(40), 72)})
        names = {"time_idx": "at", "target": "value", "group_ids": ["series"], "time_varying_unknown_reals": ["value"]}
        lengths = {"max_encoder_length": 24, "max_prediction_length": 12}
        self.train = TimeSeriesDataSet(rows[rows["at"] < 60], **names, **lengths)
        self.val = TimeSeriesDataSet.from_dataset(self.train, rows, min_prediction_idx=60)

    def train_dataloader(self):
        return self.train.to_dataloader(train=True, batch_size=self.batch_size)

    def val_dataloader(self):
        return self.val.to_dataloader(train=False, batch_size=self.batch_size)


def build(params):
    data = Waves()
    return NHiTS.from_dataset(data.train, loss=MAE(), **params), data
