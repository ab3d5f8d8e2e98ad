"""The loader that Lightning can resume, in the training process and with workers."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_bge.data.batches import loader as loader_module
from lightning_bge.data.batches.config import BatchingConfig
from lightning_bge.data.batches.loader import BatchLoader
from lightning_bge.data.batches.micro_batches import EncodedDataset
from lightning_bge.data.batches.samplers import EffectiveBatchSampler, eval_batches
from lightning_bge.data.tokens.cache import tokenize_cached
from tests.helpers.small_texts import random_texts

more_than_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create . worker processes:UserWarning")


@pytest.fixture(scope="module")
def dataset(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    tokens = tokenize_cached(random_texts(40, seed=3), tokenizer, 16, tmp_path_factory.mktemp("cache"))
    return EncodedDataset(tokens, np.arange(40, dtype=np.float32), None, max_tokens=60)


def test_an_evaluation_loader_gives_each_row_once_longest_first(dataset: EncodedDataset) -> None:
    rows = np.arange(3, 40)
    loader = BatchLoader(dataset, eval_batches(rows, dataset.tokens.lengths, 60), BatchingConfig())
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


def test_a_loader_continues_from_its_state(dataset: EncodedDataset) -> None:
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


@more_than_cores
def test_the_order_is_the_same_for_any_number_of_workers(dataset: EncodedDataset) -> None:
    none, two = (train_loader(dataset, num_workers=workers) for workers in (0, 2))
    for epoch in range(2):
        for each in (none, two):
            each.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        assert seen(none) == seen(two)


def test_the_number_of_workers_is_logged_once_with_its_reason(
    dataset: EncodedDataset, caplog: pytest.LogCaptureFixture
) -> None:
    loader_module._log_workers.cache_clear()
    caplog.set_level(logging.INFO, logger="lightning_bge")
    for workers in (0, 0, 2, 2):
        train_loader(dataset, num_workers=workers)
    assert [record.getMessage() for record in caplog.records] == [
        "num_workers 0: rows are tokenized and in memory, and are assembled faster than a worker could hand them over",
        "num_workers 2: as data.batching.num_workers says",
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0, False, torch.cuda.is_available(), None)),
        ({"num_workers": 2}, (2, True, torch.cuda.is_available(), "forkserver")),
        ({"num_workers": 2, "persistent_workers": False, "pin_memory": False}, (2, False, False, "forkserver")),
        ({"num_workers": 1, "multiprocessing_context": "spawn", "pin_memory": True}, (1, True, True, "spawn")),
        ({"multiprocessing_context": "spawn"}, (0, False, torch.cuda.is_available(), None)),
    ],
    ids=str,
)
def test_the_options_reach_the_data_loader(
    dataset: EncodedDataset, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    made: list[dict[str, Any]] = []

    def spy(*args: Any, **given: Any) -> DataLoader[Any]:
        made.append(given)
        return DataLoader(*args, **{**given, "pin_memory": False})

    monkeypatch.setattr(loader_module, "DataLoader", spy)
    found = train_loader(dataset, **options)
    [given] = made
    workers = (given["num_workers"], given["persistent_workers"])
    assert (*workers, given["pin_memory"], given["multiprocessing_context"]) == expected
    assert (found.num_workers, found.persistent_workers, found.pin_memory) == expected[:3]


def test_no_rows_make_no_batch(dataset: EncodedDataset) -> None:
    for sampler in (EffectiveBatchSampler(np.arange(0), 7, 0), eval_batches(np.arange(0), dataset.tokens.lengths, 60)):
        assert list(BatchLoader(dataset, sampler, BatchingConfig())) == []
