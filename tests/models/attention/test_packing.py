from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel, PreTrainedModel

from lightning_bge.models.attention.packed import PACKED, register_packed_attention
from lightning_bge.models.attention.packing import Packing, pad_to_bucket
from lightning_bge.types import MicroBatch

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}


def micro_batch(lengths: tuple[int, ...]) -> MicroBatch:
    tokens = sum(lengths)
    return MicroBatch(
        input_ids=torch.randint(5, 50, (tokens,)),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        lengths=lengths,
        rows=torch.arange(len(lengths)),
        token_type_ids=torch.randint(2, (tokens,)),
        labels=torch.rand(len(lengths)),
    )


def test_packing_knows_its_extent() -> None:
    packing = Packing((129, 7, 7, 1), torch.tensor([0, 129, 136, 143, 144]).int())
    assert (packing.tokens, packing.longest, packing.bound) == (144, 129, 256)
    assert packing.runs == ((129, 1), (7, 2), (1, 1))
    assert Packing((128,), torch.tensor([0, 128]).int()).bound == 128


@pytest.mark.parametrize(
    ("lengths", "multiple", "sequences", "expected"),
    [
        ((7, 5, 4), 32, None, (7, 5, 4, 6, 5, 5)),
        ((7, 5, 4), 16, None, (7, 5, 4, 6, 5, 5)),  # a full bucket still gets a dummy: the next bucket
        ((7, 5, 3), 16, None, (7, 5, 3, 1)),
        ((7, 5, 4), 1, None, (7, 5, 4, 1)),
        ((7, 5, 3), 16, 6, (7, 5, 3, 6, 6, 5)),
        ((7, 5, 4), 32, 4, (7, 5, 4, 16)),
        ((1,), 4, None, (1, 1, 1, 1)),
    ],
)
def test_totals(lengths: tuple[int, ...], multiple: int, sequences: int | None, expected: tuple[int, ...]) -> None:
    micro = micro_batch(lengths)
    padded = pad_to_bucket(micro, multiple, sequences)
    assert padded.lengths == expected
    assert padded.cu_seqlens.tolist() == [0, *torch.tensor(expected).cumsum(0).tolist()]
    assert padded.cu_seqlens.dtype == torch.int32
    total = sum(expected)
    assert total % multiple == 0
    assert padded.token_type_ids is not None
    assert [len(x) for x in (padded.input_ids, padded.positions, padded.token_type_ids)] == [total] * 3
    real = sum(lengths)
    assert torch.equal(padded.input_ids[:real], micro.input_ids)
    assert not padded.positions[real:].any()
    assert padded.labels is micro.labels


def test_without_token_types() -> None:
    micro = MicroBatch(*(torch.zeros(3).long(),) * 2, torch.tensor([0, 3]).int(), (3,), torch.zeros(1))
    assert pad_to_bucket(micro, 8).token_type_ids is None


@pytest.mark.parametrize(("multiple", "sequences", "name"), [(0, None, "multiple"), (8, 3, "sequences")])
def test_bad_sizes_are_refused(multiple: int, sequences: int | None, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        pad_to_bucket(micro_batch((4, 3, 2)), multiple, sequences)


@pytest.mark.parametrize("sequences", [None, 9])
@pytest.mark.parametrize(
    "model",
    [
        lambda: BertModel(BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
        lambda: ModernBertModel(ModernBertConfig(**SIZES, local_attention=4, pad_token_id=0)),
    ],
    ids=["bert", "modernbert"],
)
def test_neither_loss_nor_gradients_change(model, sequences: int | None) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    register_packed_attention()
    net = model().double()
    net.set_attn_implementation(PACKED)
    micro = micro_batch((9, 6, 6, 2))

    def loss_and_gradients(fed: MicroBatch) -> list[Tensor]:
        first = _hidden(net, fed).index_select(0, micro.cu_seqlens[:-1])
        assert micro.labels is not None
        loss = ((first.mean(dim=1) - micro.labels.double()) ** 2).mean()
        net.zero_grad()
        loss.backward()
        return [loss, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    plain, padded = loss_and_gradients(micro), loss_and_gradients(pad_to_bucket(micro, 32, sequences))
    assert len(plain) > 10
    for one, other in zip(plain, padded, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


def _hidden(net: PreTrainedModel, fed: MicroBatch) -> Tensor:
    inputs = {"input_ids": fed.input_ids[None], "position_ids": fed.positions[None]}
    if isinstance(net, BertModel):
        assert fed.token_type_ids is not None
        inputs["token_type_ids"] = fed.token_type_ids[None]
    return net(**inputs, packing=Packing(fed.lengths, fed.cu_seqlens)).last_hidden_state[0]
