from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_bge.models.dropout import CheapDropout
from lightning_bge.models.encoder import TextClassifier, load_classifier
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.models.memory_saving.gradient_checkpointing import set_gradient_checkpointing
from lightning_bge.models.memory_saving.lora import LoRAConfig
from tests.helpers.short_training import train
from tests.helpers.small_models import small_model

Saved = Callable[[str], str]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """Folders of encoders without a head that fits, so that one is drawn."""

    def save(kind: str, dropout: float = 0.2) -> str:
        folder = tmp_path / f"{kind}-{dropout}"
        small_model(kind, outputs=3, dropout=dropout).save_pretrained(folder)
        return str(folder)

    return save


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "modernbert", "deberta-v2"])
def test_every_trial_equals_a_fresh_load_bit_for_bit(saved: Saved, kind: str) -> None:
    folder, cache = saved(kind), EncoderCache()
    for dropout in (None, 0.4, 0.0, None):
        expected = train(load_classifier(folder, 1, dropout=dropout, seed=3))
        net = cache.load(folder, 1, dropout=dropout, seed=3)
        assert net.training
        for found, wanted in zip(train(net), expected, strict=True):
            assert torch.equal(found, wanted)


def test_one_encoder_is_read_once_and_reused(saved: Saved) -> None:
    folder, cache = saved("bert"), EncoderCache()
    first = cache.load(folder, 1, dropout=0.3)
    first.model.base_model.embeddings.requires_grad_(False)
    first.eval()
    layer = first.model.base_model.encoder.layer[0]
    layer.compile(backend="eager")
    second = cache.load(folder, 1)
    assert second is first
    assert cache.loads == 1
    assert second.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in second.parameters())
    assert {module.p for module in second.modules() if isinstance(module, CheapDropout)} == {0.2}
    assert layer._compiled_call_impl is not None


def test_another_seed_draws_the_head_that_a_fresh_load_draws(saved: Saved) -> None:
    folder, cache = saved("bert"), EncoderCache()
    heads = []
    for seed in (1, 2, 1):
        net = cache.load(folder, 1, seed=seed)
        fresh = load_classifier(folder, 1, seed=seed)
        for (name, found), wanted in zip(net.state_dict().items(), fresh.state_dict().values(), strict=True):
            assert torch.equal(found, wanted), name
        heads.append(net.model.classifier.weight.detach().clone())
    assert not torch.equal(heads[0], heads[1])


def test_another_model_or_head_is_read_anew(saved: Saved) -> None:
    cache = EncoderCache()
    one, other = saved("bert"), saved("roberta")
    assert cache.load(one, 1).model.config.model_type == "bert"
    assert cache.load(other, 1).model.config.model_type == "roberta"
    assert cache.load(other, 3).model.config.num_labels == 3
    assert cache.load(other, 3, attention="padded").packed is False
    assert cache.loads == 4


# LoRA, frozen layers and gradient checkpointing change from trial to trial
TRIALS: list[dict[str, Any]] = [
    {},
    {"gradient_checkpointing": True, "frozen_layers": 1},
    {"lora": LoRAConfig(2)},
    {"lora": LoRAConfig(2), "gradient_checkpointing": True},
    {"frozen_layers": 0},
    {},
]


@pytest.mark.parametrize("kind", ["bert", "modernbert", "distilbert"])
def test_every_trial_that_saves_memory_equals_a_fresh_load_bit_for_bit(saved: Saved, kind: str) -> None:
    folder, cache = saved(kind), EncoderCache()
    for number, options in enumerate(TRIALS):
        fresh = load_classifier(folder, 1, seed=3, **options)
        net = cache.load(folder, 1, seed=3, **options)
        needs = {name: parameter.requires_grad for name, parameter in fresh.named_parameters()}
        assert {name: parameter.requires_grad for name, parameter in net.named_parameters()} == needs
        assert recomputed(net) == recomputed(fresh) == {options.get("gradient_checkpointing", False)}
        for found, wanted in zip(train(net), train(fresh), strict=True):
            assert torch.equal(found, wanted)
        set_gradient_checkpointing(net, True)  # as a trial that ran out of memory would
        assert cache.loads == (1, 1, 2, 2, 3, 3)[number]


def recomputed(net: TextClassifier) -> set[bool]:
    return {layer.gradient_checkpointing for layer in net.modules() if isinstance(layer, GradientCheckpointingLayer)}


def test_parameters_that_a_model_itself_freezes_stay_frozen(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> TextClassifier:
        net = load_classifier(*args, **options)
        net.model.base_model.embeddings.position_embeddings.requires_grad_(False)
        return net

    monkeypatch.setattr("lightning_bge.models.encoder_cache.load_classifier", load)
    cache = EncoderCache()
    net = cache.load(saved("bert"), 1)
    net.requires_grad_(True)
    fixed = {name for name, parameter in cache.load(saved("bert"), 1).named_parameters() if not parameter.requires_grad}
    assert fixed == {"model.bert.embeddings.position_embeddings.weight"}
    assert cache.loads == 1


def test_another_seed_draws_the_factors_that_a_fresh_load_draws(saved: Saved) -> None:
    folder, cache, lora = saved("bert"), EncoderCache(), LoRAConfig(2)
    for seed in (1, 2):
        net = cache.load(folder, 1, seed=seed, lora=lora)
        fresh = load_classifier(folder, 1, seed=seed, lora=lora).state_dict()
        assert all(torch.equal(value, fresh[name]) for name, value in net.state_dict().items())
