"""Any effective batch, micro-batch size and number of ranks: the gradient is that of one big batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lightning_bge.data.batches.micro_batches import cut_micro_batches
from lightning_bge.data.batches.shards import balanced_shards
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.losses import LossConfig
from lightning_bge.types import Batch, Schema
from tests.helpers.small_models import micro_batch, random_sequences, save_model

CLASSES = Schema("multiclass", ("a", "b", "c"), ("text",), 64)
WEIGHTS = [1.0, 4.0, 0.5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("exact"), outputs=3)


@pytest.fixture(scope="module")
def modules(folder: str) -> dict[tuple[torch.dtype, bool], BGEClassifier]:
    found = {}
    for dtype in (torch.float64, torch.float32):
        for weighted in (False, True):
            loss = LossConfig(class_weights=WEIGHTS if weighted else None)
            module = BGEClassifier(folder, "multiclass", loss, dropout=0.0)
            module.set_schema(CLASSES)
            module.configure_model()
            # outside of a trainer there is none to go backward for the module
            module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]
            found[dtype, weighted] = module.to(dtype)
    return found


def one_big_batch(folder: str, dtype: torch.dtype, sequences: list[Tensor], labels: Tensor, weighted: bool) -> Any:
    """transformers' own padded model, torch's own mean loss."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True)
    weight = torch.tensor(WEIGHTS, dtype=dtype) if weighted else None
    F.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, labels, weight).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def in_pieces(module: BGEClassifier, sequences: list[Tensor], labels: Tensor, max_tokens: int, ranks: int) -> Any:
    """Each rank's shard, cut by the limit; the ranks' gradients add up."""
    assert module.loss is not None
    assert module.net is not None
    lengths = np.array([len(ids) for ids in sequences])
    seen: list[int] = []
    module.net.zero_grad(set_to_none=True)
    for shard in balanced_shards(lengths, ranks):
        micro = []
        for run in cut_micro_batches(lengths[shard], max_tokens):
            rows = shard[run].tolist()
            seen += rows
            micro.append(micro_batch([sequences[row] for row in rows], labels[rows]))
        module._add_gradients(module.loss.normalizer(labels), Batch(tuple(micro)))
    assert sorted(seen) == list(range(len(sequences)))
    return {name: parameter.grad for name, parameter in module.net.model.named_parameters()}


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    whole = torch.stack([value.norm() for value in theirs.values()]).norm()
    for name, value in theirs.items():
        # key biases have no gradient but for rounding
        scale = whole if name.endswith("key.bias") else value.norm()
        assert float((ours[name] - value).norm() / scale) < tolerance, name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=14),
    max_tokens=st.integers(1, 200),
    ranks=st.integers(1, 4),
    weighted=st.booleans(),
)
@example(lengths=[5], max_tokens=1, ranks=3, weighted=True)  # ranks without a sequence
@example(
    lengths=[40, 2, 2, 2, 2, 2, 2], max_tokens=4, ranks=2, weighted=True
)  # shards of other sizes, one over the limit
def test_gradients_are_those_of_one_big_batch(
    folder: str,
    modules: dict[tuple[torch.dtype, bool], BGEClassifier],
    lengths: list[int],
    max_tokens: int,
    ranks: int,
    weighted: bool,
) -> None:
    sequences = random_sequences(lengths, vocabulary=45, seed=sum(lengths))
    labels = torch.tensor([number % 3 for number in range(len(lengths))])
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        expected = one_big_batch(folder, dtype, sequences, labels, weighted)
        compare(in_pieces(modules[dtype, weighted], sequences, labels, max_tokens, ranks), expected, tolerance)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), tokens=st.integers(1, 120))
def test_a_micro_batch_is_split_into_the_same_sequences(lengths: list[int], tokens: int) -> None:
    sequences = random_sequences(sorted(lengths, reverse=True), vocabulary=45)
    whole = micro_batch(
        sequences, torch.arange(len(lengths)).float(), token_types=True, groups=list(range(len(lengths)))
    )
    [*parts] = Batch((whole,)).split(tokens).micro
    assert all(sum(part.lengths) <= tokens or len(part.lengths) == 1 for part in parts)
    start = 0
    for part in parts:
        stop = start + len(part.lengths)
        types = torch.cat([(torch.arange(n) > n // 2).long() for n in part.lengths])
        expected = micro_batch(sequences[start:stop], torch.arange(start, stop).float(), rows=range(start, stop))
        for name in ("input_ids", "positions", "cu_seqlens", "rows", "labels"):
            assert torch.equal(getattr(part, name), getattr(expected, name)), name
        assert part.cu_seqlens.dtype == torch.int32
        assert torch.equal(part.token_type_ids, types)
        assert part.groups.tolist() == list(range(start, stop))
        start = stop
    assert start == len(lengths)
    assert Batch((whole,)).split(None).micro[0] is whole
