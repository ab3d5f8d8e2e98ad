from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bge.data.batches.samplers import EffectiveBatchSampler


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 5))
def test_every_row_comes_once_an_epoch(n: int, batch_size: int, epoch: int) -> None:
    rows = np.arange(100, 100 + 2 * n, 2)
    sampler = EffectiveBatchSampler(rows, batch_size, seed=1)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == rows.tolist()
    assert len(batches) == len(sampler)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    other = EffectiveBatchSampler(rows, batch_size, seed=1)
    other.set_epoch(epoch)
    assert list(other) == batches


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        torch.rand(3)  # the global generator plays no part
        sampler = EffectiveBatchSampler(np.arange(50), 8, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 3) == order(1, 3)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_balanced_classes_are_drawn_equally() -> None:
    classes = np.array([0] * 900 + [1] * 80 + [2] * 20)
    rows = np.arange(1000, 2000)
    sampler = EffectiveBatchSampler(rows, 32, 0, classes)
    drawn = np.concatenate([batch for epoch in range(10) for batch in at_epoch(sampler, epoch)])
    assert len(drawn) == 10_000
    parts = np.bincount(classes[drawn - 1000]) / len(drawn)
    np.testing.assert_allclose(parts, 1 / 3, atol=0.02)


def at_epoch(sampler: EffectiveBatchSampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)
