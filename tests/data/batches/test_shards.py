"""The shard of each rank: of an effective batch, and of the rows to evaluate."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from lightning.pytorch.trainer.states import TrainerFn

from lightning_bge.data import encoded_file as source_module
from lightning_bge.data.batches.config import BatchingConfig
from lightning_bge.data.batches.micro_batches import EncodedDataset
from lightning_bge.data.batches.samplers import eval_batches
from lightning_bge.data.batches.shards import balanced_shards
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.tokens.cache import tokenize_cached
from lightning_bge.types import Batch
from tests.helpers.small_texts import random_texts

LENGTHS = arrays(np.int32, st.integers(0, 60), elements=st.integers(1, 512))


@given(LENGTHS, st.integers(1, 9))
@example(np.array([512] + [1] * 5, dtype=np.int32), 2)
@example(np.zeros(0, dtype=np.int32), 3)
def test_shards_are_balanced_and_hold_each_row_once(lengths: np.ndarray, ranks: int) -> None:
    shards = balanced_shards(lengths, ranks)
    assert len(shards) == ranks
    assert sorted(np.concatenate(shards).tolist()) == list(range(len(lengths)))  # disjoint, and nothing is left over
    assert all(shard.dtype == np.int64 and shard.tolist() == sorted(shard.tolist()) for shard in shards)
    tokens = [int(lengths[shard].sum()) for shard in shards]
    if len(lengths):
        assert max(tokens) - min(tokens) <= lengths.max()
        # Graham's bound: no schedule whatever is shorter by more than a third
        assert max(tokens) <= (4 / 3 - 1 / (3 * ranks)) * shortest_possible(lengths, ranks) + 1e-9 or len(lengths) > 6
    if len(lengths) >= ranks:
        assert min(tokens) > 0
    other = balanced_shards(lengths.copy(), ranks)
    assert all(np.array_equal(a, b) for a, b in zip(shards, other, strict=True))


def shortest_possible(lengths: np.ndarray, ranks: int) -> int:
    """The least maximum over all ways to deal up to 6 sequences."""
    if len(lengths) > 6:
        return 0
    states = {(0,) * ranks}
    for length in lengths.tolist():
        states = {
            tuple(sorted((*state[:rank], state[rank] + length, *state[rank + 1 :])))
            for state in states
            for rank in range(ranks)
        }
    return min(max(state) for state in states)


def test_ties_go_to_the_first() -> None:
    assert [shard.tolist() for shard in balanced_shards(np.array([3, 3, 3, 3, 3]), 2)] == [[0, 2, 4], [1, 3]]
    assert [shard.tolist() for shard in balanced_shards(np.array([1, 5, 2, 4]), 2)] == [[0, 1], [2, 3]]
    assert [shard.tolist() for shard in balanced_shards(np.array([7]), 3)] == [[0], [], []]


@pytest.fixture(scope="module")
def dataset(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    tokens = tokenize_cached(random_texts(40, seed=3), tokenizer, 16, tmp_path_factory.mktemp("cache"))
    return EncodedDataset(tokens, np.arange(40, dtype=np.float32), None, max_tokens=60)


def rows_of(batch: Batch) -> list[int]:
    return [row for micro in batch.micro for row in micro.rows.tolist()]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_items_are_shards(dataset: EncodedDataset, size: int, ranks: int) -> None:
    rows = np.random.default_rng(size).permutation(40)[:size].tolist()
    dataset.set_rank(0, 1)
    whole = dataset[rows]
    assert whole.shard_tokens == ()
    found = []
    for rank in range(ranks):
        dataset.set_rank(rank, ranks)
        batch = dataset[rows]
        found += rows_of(batch)
        if ranks > 1:
            assert sum(batch.shard_tokens) == whole.tokens
            assert batch.shard_tokens[rank] == batch.tokens
        assert all(sum(micro.lengths) <= 60 or len(micro.lengths) == 1 for micro in batch.micro)
    assert sorted(found) == sorted(rows)
    if ranks == 1:
        assert found == rows_of(whole)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(1, 600))
def test_evaluation_gives_each_row_to_one_rank(lengths: np.ndarray, ranks: int, tokens: int) -> None:
    rows = np.arange(len(lengths))
    alone = eval_batches(rows, lengths, tokens)
    ranked = [eval_batches(rows, lengths, tokens, rank, ranks) for rank in range(ranks)]
    assert {len(own) for own in ranked} == {-(-len(alone) // ranks)}
    turns = [batch for turn in zip(*ranked, strict=True) for batch in turn]
    assert turns[: len(alone)] == alone
    assert turns[len(alone) :] == [[]] * (len(turns) - len(alone))


def test_an_empty_batch_can_be_moved_and_split(dataset: EncodedDataset) -> None:
    dataset.set_rank(0, 1)
    batch = dataset[[]]
    assert (batch.micro, batch.size, batch.tokens, batch.labels) == ((), 0, 0, None)
    assert batch.to("cpu").split(10) == batch


def trainer(rank: int, ranks: int) -> Any:
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    return SimpleNamespace(global_rank=rank, world_size=ranks, state=state, overfit_batches=0)


@pytest.fixture
def data(tokenizer_dir: str, pairs_file: Path, tmp_path: Path) -> TextDataModule:
    batching = BatchingConfig(max_tokens=60, eval_max_tokens=60)
    options = {"cache_dir": str(tmp_path / "cache"), "batch_size": 7, "batching": batching}
    return TextDataModule(tokenizer_dir, train_file=str(pairs_file), **options)


def test_each_rank_of_the_trainer_gets_its_shard(data: TextDataModule) -> None:
    data.setup("fit")
    alone = [list(loader) for loader in (data.train_dataloader(), data.val_dataloader())]
    shards = []
    for rank in range(3):
        data.trainer = trainer(rank, 3)
        loaders = data.train_dataloader(), data.val_dataloader()
        assert len(loaders[0]) == len(alone[0])
        shards.append([list(loader) for loader in loaders])
    for step, batch in enumerate(alone[0]):
        parts = [own[0][step] for own in shards]
        assert sorted(row for part in parts for row in rows_of(part)) == sorted(rows_of(batch))
        assert {part.shard_tokens for part in parts} == {tuple(part.tokens for part in parts)}
    evaluated = [row for own in shards for batch in own[1] for row in rows_of(batch)]
    assert sorted(evaluated) == sorted(row for batch in alone[1] for row in rows_of(batch))
    data.trainer = trainer(0, 1)  # a later run on one device
    assert [rows_of(batch) for batch in data.train_dataloader()] == [rows_of(batch) for batch in alone[0]]
    assert [rows_of(batch) for batch in data.val_dataloader()] == [rows_of(batch) for batch in alone[1]]


def test_a_loader_of_a_rank_resumes_within_an_epoch(data: TextDataModule) -> None:
    data.setup("fit")
    data.trainer = trainer(1, 2)
    loader = data.train_dataloader()
    whole = [rows_of(batch) for batch in loader]
    resumed = data.train_dataloader()
    resumed.load_state_dict({"epoch": 0, "batches": 3})
    assert [rows_of(batch) for batch in resumed] == whole[3:]


def test_one_process_of_a_machine_tokenizes_for_all(data: TextDataModule, monkeypatch: pytest.MonkeyPatch) -> None:
    data.prepare_data()
    assert data.schema is None  # without a trainer there is nothing to prepare for
    data.trainer = trainer(0, 2)
    data.prepare_data()
    source_module.load_training_file.cache_clear()
    source_module.load_file.cache_clear()
    monkeypatch.setattr("lightning_bge.data.tokens.cache._tokenize", None)  # another process finds all in the cache
    other = TextDataModule(
        data.tokenizer, train_file=data.train_file, cache_dir=data.cache_dir, batch_size=7, batching=data.batching
    )
    other.setup("fit")
    assert other.data_hash == data.data_hash
    assert torch.equal(torch.as_tensor(other.train_rows), torch.as_tensor(data.train_rows))
