from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_bge.data.batches.max_tokens import (
    BatchingConfig,
    BatchLoader,
    EffectiveBatchSampler,
    EncodedDataset,
    EvalSampler,
    cut,
)
from lightning_bge.data.tokens.cache import tokenize_cached
from lightning_bge.errors import ConfigError
from tests.helpers.small_texts import random_texts

TEXTS = random_texts(40, seed=3)


@pytest.fixture(scope="module")
def dataset(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    tokens = tokenize_cached(TEXTS, tokenizer, 16, tmp_path_factory.mktemp("cache"))
    labels = np.arange(40, dtype=np.float32)
    return EncodedDataset(tokens, labels, np.arange(40) // 4, max_tokens=60)


@given(arrays(np.int32, st.integers(0, 60), elements=st.integers(1, 50)), st.integers(1, 120))
def test_cut(lengths: np.ndarray, max_tokens: int) -> None:
    runs = cut(lengths, max_tokens)
    order = np.concatenate([np.empty(0, np.int64), *runs])
    # Sorted, stable, each once: exactly what a plain sort gives.
    assert order.tolist() == sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for number, run in enumerate(runs):
        assert len(run) == 1 or lengths[run].sum() <= max_tokens
        if number + 1 < len(runs):  # greedy: the next one did not fit
            assert lengths[run].sum() + lengths[runs[number + 1][0]] > max_tokens


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 5), st.data())
def test_sampler(n: int, batch_size: int, epoch: int, data: st.DataObject) -> None:
    rows = np.arange(100, 100 + 2 * n, 2)
    sampler = EffectiveBatchSampler(rows, batch_size, seed=1)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == rows.tolist()
    assert len(batches) == len(sampler)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    again = EffectiveBatchSampler(rows, batch_size, seed=1)
    again.set_epoch(epoch)
    again.skip = skip = data.draw(st.integers(0, len(batches)))
    assert list(again) == batches[skip:]
    assert list(again) == batches  # a skip holds once


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        torch.rand(3)  # the global generator plays no part
        sampler = EffectiveBatchSampler(np.arange(50), 8, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 3) == order(1, 3)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_balanced() -> None:
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


def test_item_agrees_with_the_tokenizer(dataset: EncodedDataset, tokenizer: Any) -> None:
    rows = [5, 0, 39, 7, 8, 21, 22]
    batch = dataset[rows]
    assert sorted(row for micro in batch.micro for row in micro.rows.tolist()) == sorted(rows)
    assert len(batch.micro) > 1
    assert batch.size == 7
    for micro in batch.micro:
        assert sum(micro.lengths) <= 60
        assert list(micro.lengths) == sorted(micro.lengths, reverse=True)
        assert micro.cu_seqlens.tolist() == [0, *np.cumsum(micro.lengths)]
        assert micro.labels is not None
        assert micro.groups is not None
        assert micro.token_type_ids is not None
        assert micro.labels.tolist() == micro.rows.tolist()
        assert micro.groups.tolist() == (micro.rows // 4).tolist()
        for number, row in enumerate(micro.rows.tolist()):
            expected = tokenizer(*TEXTS[row], truncation=True, max_length=16)
            here = slice(micro.cu_seqlens[number], micro.cu_seqlens[number + 1])
            assert micro.input_ids[here].tolist() == expected["input_ids"]
            assert micro.token_type_ids[here].tolist() == expected["token_type_ids"]
            assert micro.positions[here].tolist() == list(range(len(expected["input_ids"])))
        dtypes = [getattr(micro, name).dtype for name in ("input_ids", "positions", "token_type_ids", "rows", "groups")]
        assert dtypes == [torch.int64] * 5
        assert (micro.cu_seqlens.dtype, micro.labels.dtype) == (torch.int32, torch.float32)


def test_item_can_be_written_to(dataset: EncodedDataset) -> None:
    """Nobody may change the cache or the labels through a batch."""
    micro = dataset[[1]].micro[0]
    before = dataset[[1]].micro[0]
    assert micro.labels is not None
    for tensor in (micro.input_ids, micro.labels, micro.rows):
        tensor.zero_()
    assert torch.equal(dataset[[1]].micro[0].input_ids, before.input_ids)
    assert torch.equal(dataset[[1]].labels, before.labels)  # type: ignore[arg-type]


def test_without_labels(dataset: EncodedDataset) -> None:
    bare = EncodedDataset(dataset.tokens, None, None, 1000)[[1, 2]]
    assert len(bare.micro) == 1
    assert bare.labels is None
    assert bare.micro[0].groups is None


def test_eval_loader(dataset: EncodedDataset) -> None:
    rows = np.arange(3, 40)
    loader = BatchLoader(dataset, EvalSampler(rows, dataset.tokens.lengths, 60), BatchingConfig())
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(len(batch.micro) == 1 for batch in batches)
        lengths = [length for batch in batches for length in batch.micro[0].lengths]
        assert lengths == sorted(lengths, reverse=True)
        assert sorted(row for batch in batches for row in batch.micro[0].rows.tolist()) == rows.tolist()


def seen(loader: BatchLoader) -> list[list[int]]:
    return [[row for micro in batch.micro for row in micro.rows.tolist()] for batch in loader]


def train_loader(dataset: EncodedDataset, **options: Any) -> BatchLoader:
    return BatchLoader(dataset, EffectiveBatchSampler(np.arange(40), 7, 0), BatchingConfig(**options))


def test_loader_state(dataset: EncodedDataset) -> None:
    loader = train_loader(dataset)
    whole = seen(loader)
    iterator = iter(loader)
    for done in range(1, 6):
        next(iterator)
        assert loader.state_dict() == {"epoch": 0, "batches": done}
        other = train_loader(dataset)
        other.load_state_dict(loader.state_dict())
        assert len(other) == 6
        assert seen(other) == whole[done:]
        assert other.state_dict() == {"epoch": 0, "batches": 6}
        assert seen(other) == whole
    other.load_state_dict({"epoch": 4, "batches": 2})  # of another epoch
    assert seen(other) == whole
    other.load_state_dict({"epoch": 0, "batches": 6})  # of a whole epoch
    assert seen(other) == whole


def test_epoch_set_after_iter_counts(dataset: EncodedDataset) -> None:
    """Lightning resumes in this order."""
    loader, other = train_loader(dataset), train_loader(dataset)
    loader.sampler.set_epoch(2)  # type: ignore[union-attr]
    expected = seen(loader)
    iterator = iter(other)
    other.sampler.set_epoch(2)  # type: ignore[union-attr]
    assert [[row for micro in batch.micro for row in micro.rows.tolist()] for batch in iterator] == expected


def test_loader_leaves_the_random_state_alone(dataset: EncodedDataset) -> None:
    before = torch.get_rng_state()
    seen(train_loader(dataset))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"eval_max_tokens": 0},
        {"num_workers": -1},
        {"seed": -1},
        {"multiprocessing_context": "thread"},
    ],
)
def test_config(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"data.batching.{next(iter(bad))}"):
        BatchingConfig(**bad)


def test_no_copy_of_the_file(dataset: EncodedDataset) -> None:
    base = dataset.tokens.input_ids
    assert not base.flags.owndata
    assert Path(dataset.tokens.path).is_file()
