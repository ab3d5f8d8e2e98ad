from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_bge.data.batches.micro_batches import EncodedDataset, cut_micro_batches
from lightning_bge.data.tokens.cache import tokenize_cached
from tests.helpers.small_texts import random_texts

TEXTS = random_texts(40, seed=3)


@pytest.fixture(scope="module")
def dataset(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    tokens = tokenize_cached(TEXTS, tokenizer, 16, tmp_path_factory.mktemp("cache"))
    labels = np.arange(40, dtype=np.float32)
    return EncodedDataset(tokens, labels, np.arange(40) // 4, max_tokens=60)


@given(arrays(np.int32, st.integers(0, 60), elements=st.integers(1, 50)), st.integers(1, 120))
def test_cut_as_a_plain_sort_and_greedy(lengths: np.ndarray, max_tokens: int) -> None:
    parts = cut_micro_batches(lengths, max_tokens)
    order = np.concatenate([np.empty(0, np.int64), *parts])
    # Sorted, stable, each once: exactly what a plain sort gives.
    assert order.tolist() == sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for number, part in enumerate(parts):
        assert len(part) == 1 or lengths[part].sum() <= max_tokens
        if number + 1 < len(parts):  # greedy: the next one did not fit
            assert lengths[part].sum() + lengths[parts[number + 1][0]] > max_tokens


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


def test_no_copy_of_the_file(dataset: EncodedDataset) -> None:
    base = dataset.tokens.input_ids
    assert not base.flags.owndata
    assert Path(dataset.tokens.path).is_file()
