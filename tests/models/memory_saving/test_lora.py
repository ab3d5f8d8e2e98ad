"""LoRA: which parameters train, and that the merged weights give the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bge.errors import ConfigError
from lightning_bge.models.encoder import TextClassifier, load_classifier
from lightning_bge.models.memory_saving import lora as module_of_lora
from lightning_bge.models.memory_saving.freezing import find_layers
from lightning_bge.models.memory_saving.gradient_checkpointing import set_gradient_checkpointing
from lightning_bge.models.memory_saving.lora import LoRAConfig, merged_weights
from tests.helpers.memory_saving import KINDS, LORA, gradients, make_net, same
from tests.helpers.small_models import micro_batch, random_sequences, save_model


def disturb(net: TextClassifier) -> None:
    """Factors and head as after some training."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_start_at_nothing_and_train_with_the_head_alone(kind: str) -> None:
    plain, net = make_net(kind), make_net(kind, lora=LORA)
    micro = micro_batch(random_sequences((9, 5)))
    assert torch.equal(net(micro), plain(micro))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    head = {name for name in trained if ".lora_" not in name}
    _, layers = find_layers(plain.model)
    linear = [name for name, part in layers.named_modules() if isinstance(part, nn.Linear)]
    assert len(trained - head) == 2 * len(linear)
    words = ("classifier", "pooler", "head", "final_norm")
    assert head == {name for name in dict(plain.named_parameters()) if any(word in name for word in words)}
    disturb(net)
    got = gradients(net)
    assert got.keys() <= trained
    assert {name for name in trained if ".lora_" in name} <= got.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_give_the_same_logits_and_leave_the_model_alone(kind: str) -> None:
    net = make_net(kind, lora=LoRAConfig(3, alpha=4.5))
    disturb(net)
    net.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    weights = merged_weights(net.model)
    assert same(net.state_dict(), before)
    other = make_net(kind, seed=9).eval()
    assert weights.keys() == other.model.state_dict().keys()
    other.model.load_state_dict(weights)
    micro = micro_batch(random_sequences((9, 5, 3)))
    torch.testing.assert_close(other(micro), net(micro), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(make_net(kind).eval()(micro), net(micro), atol=1e-2)


def test_what_is_merged_is_the_product_times_alpha_over_rank() -> None:
    net = make_net("bert", lora=LoRAConfig(3, alpha=4.5, target_modules=["query", "attention.output.dense"]))
    disturb(net)
    state = net.model.state_dict()
    changed = {name for name, value in merged_weights(net.model).items() if name not in state}
    assert changed == {
        f"bert.encoder.layer.{layer}.attention.{part}.{tensor}"
        for layer in range(2)
        for part in ("self.query", "output.dense")
        for tensor in ("weight", "bias")
    }
    name = "bert.encoder.layer.1.attention.self.query"
    a, b = (state[f"{name}.lora_{factor}.default.weight"] for factor in "AB")
    expected = state[f"{name}.base_layer.weight"] + 1.5 * b @ a
    torch.testing.assert_close(merged_weights(net.model)[f"{name}.weight"], expected)


def test_without_lora_the_weights_are_the_state() -> None:
    net = make_net("bert")
    assert same(merged_weights(net.model), net.model.state_dict())


def test_factors_get_bf16_under_autocast_and_are_recomputed_alike() -> None:
    net = make_net("bert", lora=LORA, dropout=0.3)
    disturb(net)
    seen = set()
    for name, module in net.named_modules():
        if name.endswith("self.query.lora_A.default"):
            module.register_forward_pre_hook(lambda _, given: seen.add(given[0].dtype))
    expected = gradients(net, bf16=True)
    assert seen == {torch.bfloat16}
    set_gradient_checkpointing(net, True)
    assert same(gradients(net, bf16=True), expected)


def test_factors_come_from_the_seed(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    generator = torch.random.get_rng_state()

    def factors(seed: int) -> dict[str, Tensor]:
        net = load_classifier(folder, 1, seed=seed, lora=LORA)
        assert all(module.training for module in net.modules())
        return {name: value for name, value in net.state_dict().items() if "lora_A" in name}

    one = factors(1)
    assert same(factors(1), one)
    assert not any(torch.equal(value, one[name]) for name, value in factors(2).items())
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_an_error_says_how_to_install_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of_lora, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lightning-bge\[lora\]'"):
        make_net("bert", lora=LORA)
    make_net("bert", frozen_layers=0)


def test_unknown_target_modules_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected some of dense, key, query, value, or null, got Wqkv"):
        make_net("bert", lora=LoRAConfig(2, target_modules=["query", "Wqkv"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, r"r: expected 1 or more, or null, got 0"),
        ({"r": 4, "alpha": 0.0}, r"alpha: expected more than 0, or null, got 0\.0"),
        ({"r": 4, "target_modules": []}, r"target_modules: expected names of linear layers, or null for all"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"model.lora.{message}"):
        LoRAConfig(**changes)
