"""Chains of carbon, oxygen and nitrogen for the network of chemprop: a data module for chemprop_mpnn.yaml."""

import random

import numpy as np
from chemprop.data import MoleculeDatapoint, MoleculeDataset, build_dataloader
from lightning.pytorch import LightningDataModule


class Chains(LightningDataModule):
    """Two folds. The target is the number of oxygen atoms less that of nitrogen."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size, self.num_folds, self.fold = batch_size, 2, 0
        draw = random.Random(0)
        chains = ["".join(draw.choices("CCCON", k=draw.randint(3, 12))) for _ in range(160)]
        values = [np.array([float(one.count("O") - one.count("N"))]) for one in chains]
        self.rows = [MoleculeDatapoint.from_smi(*one) for one in zip(chains, values, strict=True)]

    def select_fold(self, k: int) -> None:
        self.fold = k

    def train_dataloader(self):
        return build_dataloader(MoleculeDataset(self.rows[1 - self.fold :: 2]), self.batch_size)

    def val_dataloader(self):
        return build_dataloader(MoleculeDataset(self.rows[self.fold :: 2]), 40, shuffle=False)
