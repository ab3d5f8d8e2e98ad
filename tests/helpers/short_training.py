"""A few training steps of an encoder, to be compared with those of another one."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_bge.models.encoder import TextClassifier
from tests.helpers.small_models import cut_batch, random_sequences


def train(net: TextClassifier, steps: int = 4) -> list[Tensor]:
    """Losses and the weights after them, on the weights' device; random numbers from the steps' numbers."""
    device = next(net.parameters()).device
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    batch = cut_batch(random_sequences((9, 7, 5, 5, 3, 2), seed=1), torch.zeros(6), 3).to(device)
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = torch.stack([net(micro).square().mean() for micro in batch.micro]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return [*found, *(value.clone() for value in net.state_dict().values())]
