"""The layer of each architecture that gives the logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_bge.errors import ConfigError
from lightning_bge.models.encoder import TextClassifier, load_classifier
from lightning_bge.models.memory_saving.lora import LoRAConfig, merged_weights
from lightning_bge.models.output.output_layer import divide_logits, find_output_layer
from lightning_bge.types import MicroBatch
from tests.helpers.small_models import micro_batch, random_sequences, save_model, small_model

NAMES = {
    **dict.fromkeys(("bert", "deberta-v2", "distilbert", "modernbert"), "classifier"),
    **dict.fromkeys(("roberta", "xlm-roberta", "mpnet"), "classifier.out_proj"),
}


def some_rows() -> MicroBatch:
    return micro_batch(random_sequences([9, 5, 3], vocabulary=45, seed=1))


@pytest.mark.parametrize("outputs", [1, 3, 32])  # 32: as wide as the hidden layers
@pytest.mark.parametrize("kind", list(NAMES))
def test_the_layer_is_found_and_divides_the_logits(kind: str, outputs: int) -> None:
    net = TextClassifier(small_model(kind, outputs))
    micro, before = some_rows(), {name: weight.clone() for name, weight in net.model.state_dict().items()}
    layer = find_output_layer(net, micro)
    assert layer is net.model.get_submodule(NAMES[kind])
    assert net.training
    assert all(weight.equal(before[name]) for name, weight in net.model.state_dict().items())
    net.eval()
    with torch.no_grad():
        logits = net(micro)
        divide_logits(layer, 2.5)
        torch.testing.assert_close(net(micro), logits / 2.5)
    changed = {name for name, weight in net.model.state_dict().items() if not weight.equal(before[name])}
    assert changed == {f"{NAMES[kind]}.weight", f"{NAMES[kind]}.bias"}


def test_the_merged_weights_of_lora_hold_the_divided_layer(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "bert", outputs=1)
    net = load_classifier(folder, 1, lora=LoRAConfig(r=2))
    before = merged_weights(net.model)
    before = {name: weight.clone() for name, weight in before.items()}
    divide_logits(find_output_layer(net, some_rows()), 2.0)
    for name, weight in merged_weights(net.model).items():
        assert weight.equal(before[name] / 2 if name.startswith("classifier.") else before[name]), name


def test_a_head_without_such_a_layer_is_an_error() -> None:
    net = TextClassifier(small_model("bert", 1), "padded")
    net.model.classifier = nn.Sequential(net.model.classifier, nn.Tanh())  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="can't be built into a bert, as its logits are not the output of one linear"):
        find_output_layer(net, some_rows())


def test_a_layer_that_shares_its_weights_is_an_error() -> None:
    net = TextClassifier(small_model("bert", 32), "padded")
    net.model.classifier.weight = net.model.bert.pooler.dense.weight  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="its last layer shares its weights"):
        find_output_layer(net, some_rows())


def test_a_layer_of_zeros_is_found() -> None:
    net = TextClassifier(small_model("roberta", 1))
    layer = net.model.get_submodule("classifier.out_proj")
    assert isinstance(layer, nn.Linear)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    assert find_output_layer(net, some_rows()) is layer


def test_other_tied_weights_stay_as_they_are() -> None:
    net = TextClassifier(small_model("bert", 1))
    first, second = (layer.attention.self.query for layer in net.model.bert.encoder.layer)  # type: ignore[union-attr]
    second.weight = first.weight
    tied: Tensor = first.weight.detach().clone()
    divide_logits(find_output_layer(net, some_rows()), 2.0)
    assert first.weight.equal(tied)
    assert second.weight is first.weight
