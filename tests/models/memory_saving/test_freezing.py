"""Frozen layers: what does not train has no gradient, no optimizer state, and keeps no activations."""

from __future__ import annotations

import pytest

from lightning_bge.errors import ConfigError
from lightning_bge.models.optimizer import OptimizerConfig, build_optimizer
from tests.helpers.memory_saving import HIDDEN, gradients, make_net, same, saved_bytes

FROZEN = {
    ("bert", 0): ("bert.embeddings.",),
    ("bert", 1): ("bert.embeddings.", "bert.encoder.layer.0."),
    ("xlm-roberta", 2): ("roberta.",),
    ("modernbert", 3): ("model.embeddings.", "model.layers.0.", "model.layers.1.", "model.layers.2."),
    ("deberta-v2", 1): (
        "deberta.embeddings.",
        "deberta.encoder.rel_embeddings.",
        "deberta.encoder.LayerNorm.",
        "deberta.encoder.layer.0.",
    ),
    ("mpnet", 0): ("mpnet.embeddings.", "mpnet.encoder.relative_attention_bias."),
    ("distilbert", 1): ("distilbert.embeddings.", "distilbert.transformer.layer.0."),
}


@pytest.mark.parametrize(("kind", "layers"), FROZEN)
def test_frozen_parameters_have_no_gradient_and_no_optimizer_state(kind: str, layers: int) -> None:
    plain, net = make_net(kind), make_net(kind, frozen_layers=layers)
    expected = gradients(plain)
    wanted = {name: value for name, value in expected.items() if not name[6:].startswith(FROZEN[kind, layers])}
    assert 0 < len(wanted) < len(expected)
    assert same(gradients(net), wanted)
    grouped = {id(p) for group in build_optimizer(net, OptimizerConfig()).param_groups for p in group["params"]}
    assert grouped == {id(p) for name, p in net.named_parameters() if not name[6:].startswith(FROZEN[kind, layers])}


@pytest.mark.parametrize("kind", ["bert", "modernbert", "deberta-v2"])
def test_nothing_is_kept_below_the_first_layer_that_trains(kind: str) -> None:
    plain, found = saved_bytes(make_net(kind)), saved_bytes(make_net(kind, frozen_layers=1))
    assert (found.pop("embeddings"), found.pop("0")) == (0, 0)
    assert min(plain.pop("embeddings"), plain.pop("0")) > 0
    assert found.keys() == plain.keys()
    assert all(0 < value <= plain[name] for name, value in found.items())
    recomputed = saved_bytes(make_net(kind, frozen_layers=1, gradient_checkpointing=True))
    inputs = (sum(recomputed.values()) - plain["head"]) / (len(plain) - 1)
    assert HIDDEN[kind] <= inputs < 2 * HIDDEN[kind]


def test_more_frozen_layers_than_the_model_has_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="frozen_layers: expected at most 2, the number of this model's layers, got 3"
    ):
        make_net("bert", frozen_layers=3)
