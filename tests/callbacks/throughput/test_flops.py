"""What is counted of batches, and FLOPs, against what transformers and torch say themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, BatchEncoding

from lightning_bge.callbacks.throughput.flops import TrainFlops, Work, matmul_dtype, work_of
from lightning_bge.models.encoder import TextClassifier
from tests.helpers.small_models import cut_batch, quiet_trainer, random_sequences, small_config, small_model

LENGTHS = (9, 4, 4, 2, 1)


@pytest.mark.parametrize(("attention", "bucket"), [("packed", None), ("packed", 16), ("padded", None)])
def test_computed_tokens_are_those_that_the_model_is_fed(attention: Any, bucket: int | None) -> None:
    net = TextClassifier(small_model("bert"), attention)
    net.token_bucket = bucket
    batch = cut_batch(random_sequences(LENGTHS), torch.zeros(len(LENGTHS)), 2)
    fed: list[int] = []
    words = net.model.base_model.embeddings.word_embeddings
    words.register_forward_hook(lambda _, inputs, __: fed.append(inputs[0].numel()))
    for micro in batch.micro:
        net(micro)
    work = work_of(batch, net)
    assert (work.sequences, work.tokens, work.squares) == (5, 20, 81 + 16 + 16 + 4 + 1)
    assert work.computed == sum(fed)
    assert work.padding == pytest.approx(1 - 20 / sum(fed))
    if attention == "padded":
        assert work.padding == pytest.approx(1 - 20 / (3 * 9 + 2 * 2))


def test_padding_of_a_mask_is_that_of_its_shape() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    work = work_of({"attention_mask": mask})
    assert (work.sequences, int(work.tokens), int(work.squares), work.computed) == (2, 4, 10, 8)
    assert float(work.padding) == 0.5  # type: ignore[arg-type]


def test_the_batch_of_a_tokenizer_is_a_mapping() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    batch = BatchEncoding({"input_ids": mask, "attention_mask": mask})
    assert hasattr(batch, "tokens")  # a method of its own
    assert work_of(batch) == work_of({"attention_mask": mask})


def test_where_padding_is_not_known() -> None:
    batch = cut_batch(random_sequences((3, 2)), torch.zeros(2), 1)
    four = {"attention_mask": torch.ones(2, 1, 4, 4)}
    for work in (work_of(batch), work_of(four), work_of("text", None, lambda batch: (1, 4))):
        assert work.computed is None
        assert work.padding is None
    total = Work() + work_of(batch) + work_of({"attention_mask": torch.ones(2, 3)})
    assert total.padding is None
    assert total.sequences == 4


def test_sums_and_differences() -> None:
    one = Work(2, 10, 60, 12, 3.0, 1.0)
    two = Work(1, 5, 25, 5, 0.5, 0.25)
    assert one + two == Work(3, 15, 85, 17, 3.5, 1.25)
    assert one + two - two == one
    assert Work().padding == 0


def test_what_lies_on_a_device_is_not_read() -> None:
    work = Work() + work_of({"attention_mask": torch.ones(3, 5, device="meta")})  # to read a meta tensor is an error
    assert work.on_host() is None
    assert isinstance(work.padding, torch.Tensor)
    read = (Work() + work_of({"attention_mask": torch.ones(3, 5)})).on_host()
    assert read == Work(3, 15, 75, 15)
    assert type(read.tokens) is int  # type: ignore[union-attr]


SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "max_position_embeddings": 128}


def torch_flops(model: nn.Module, length: int) -> int:
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, length, dtype=torch.long)).logits.sum().backward()  # type: ignore[operator]
    return counter.get_total_flops()


def big_bert() -> nn.Module:
    config = small_config("bert", attn_implementation="eager", **SIZES)
    return AutoModelForSequenceClassification.from_config(config)


def test_flops_agree_with_torch_s_counter() -> None:
    model, length = big_bert(), 96
    found = TrainFlops.of(model).total(Work(1, length, length**2))
    assert found == pytest.approx(torch_flops(model, length), rel=0.05)  # ours counts the head at every token


def test_frozen_layers_have_no_backward_pass() -> None:
    model, length = big_bert(), 16
    for part in (model.bert.embeddings, *model.bert.encoder.layer[:2]):  # type: ignore[union-attr,index]
        part.requires_grad_(False)
    found = TrainFlops.of(model).total(Work(1, length, length**2))
    assert found == pytest.approx(
        torch_flops(model, length), rel=0.1
    )  # nor has the first layer that learns a gradient of its input


def test_flops_of_any_module() -> None:
    module = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 4), nn.Linear(4, 1, bias=False))
    module[2].requires_grad_(False)
    assert TrainFlops.of(module) == TrainFlops(6 * (8 * 4 + 4) + 2 * 4, 0)


@pytest.mark.parametrize(
    ("precision", "weights", "expected"),
    [
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("16-mixed", torch.float32, torch.float16),
        ("32-true", torch.bfloat16, torch.bfloat16),
        ("64-true", torch.float64, torch.float64),
    ],
)
def test_the_type_that_matrices_are_multiplied_in(precision: Any, weights: torch.dtype, expected: torch.dtype) -> None:
    class Trainer:
        pass

    trainer: Any = Trainer()
    trainer.precision = precision
    module: Any = nn.Linear(2, 2).to(weights)
    assert matmul_dtype(trainer, module) is expected
    assert str(quiet_trainer().precision) == "32-true"  # as Lightning names it
