"""NHITS of neuralforecast, of the package `pytorch_lightning`, on noisy waves, for `tune`, `plan` and `audit`."""

import numpy as np
import pandas as pd
from neuralforecast.models import NHITS
from neuralforecast.tsdataset import TimeSeriesDataModule, TimeSeriesDataset

SPACE = {
    "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "dropout_prob_theta": {"choices": [0.0, 0.2]},
}
OPTIONS = {"metric": "ptl/val_loss", "weights_only": False}


def build(params):
    random, at = np.random.default_rng(0), pd.date_range("2026-01-01", periods=96, freq="h")
    waves = [np.sin(np.arange(96) / random.uniform(1, 4)) + random.normal(0, 0.1, 96) for _ in range(80)]
    rows = pd.DataFrame({"unique_id": np.repeat(range(80), 96), "ds": np.tile(at, 80), "y": np.concatenate(waves)})
    dataset, *_ = TimeSeriesDataset.from_df(rows)
    model = NHITS(h=12, input_size=24, random_seed=1, **params)
    model.val_size, model.test_size = 24, 0  # as its `fit` sets them
    return model, TimeSeriesDataModule(dataset=dataset, batch_size=16)
