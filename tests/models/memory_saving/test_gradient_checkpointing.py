"""Gradient checkpointing: what a recomputed layer keeps, and that gradients stay the same."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_bge.callbacks.compile.layers import find_layers
from lightning_bge.errors import ConfigError
from lightning_bge.models.encoder import TextClassifier
from lightning_bge.models.memory_saving.gradient_checkpointing import (
    set_gradient_checkpointing,
    supports_gradient_checkpointing,
    uses_gradient_checkpointing,
)
from lightning_bge.models.memory_saving.lora import LoRAConfig
from lightning_bge.runtime.compat.torch import compiled_call
from tests.helpers.memory_saving import HIDDEN, KINDS, LORA, gradients, make_net, same, saved_bytes
from tests.helpers.small_models import micro_batch, random_sequences


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "distilbert"])
def test_recomputed_layers_have_the_same_gradients_with_dropout_on(kind: str, bf16: bool) -> None:
    net = make_net(kind, dropout=0.3)
    expected = gradients(net, bf16)
    calls: list[int] = []
    net.model.base_model.get_submodule(
        {"modernbert": "layers.1.mlp", "distilbert": "transformer.layer.1.ffn"}.get(kind, "encoder.layer.1.output")
    ).register_forward_pre_hook(lambda *_: calls.append(1))
    set_gradient_checkpointing(net, True)
    assert uses_gradient_checkpointing(net)
    assert same(gradients(net, bf16), expected)
    assert len(calls) == 2 * 2  # micro-batches, each forward and in the backward pass
    set_gradient_checkpointing(net, False)
    assert not uses_gradient_checkpointing(net)
    assert same(gradients(net, bf16), expected)
    assert len(calls) == 2 * 2 + 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_recomputed_layer_keeps_its_input_alone(kind: str) -> None:
    plain = saved_bytes(make_net(kind))
    layers = plain.keys() - {"embeddings", "head"}
    found = sum(saved_bytes(make_net(kind, gradient_checkpointing=True)).values())
    inputs = (found - plain["embeddings"] - plain["head"]) / len(layers)
    assert HIDDEN[kind] <= inputs < 2 * HIDDEN[kind]  # DeBERTa's layers have a mask too
    assert all(plain[name] > 10 * HIDDEN[kind] for name in layers - {"1"})  # BERT's last layer keeps little


def test_nothing_is_recomputed_in_evaluation() -> None:
    net = make_net("bert", gradient_checkpointing=True).eval()
    assert gradients(net).keys() == dict(net.named_parameters()).keys()
    assert sum(saved_bytes(net).values()) == sum(saved_bytes(make_net("bert").eval()).values())


def test_architecture_that_cannot_be_recomputed() -> None:
    net = make_net("mpnet")
    assert not supports_gradient_checkpointing(net)
    set_gradient_checkpointing(net, False)
    with pytest.raises(ConfigError, match=r"gradient_checkpointing: .* this architecture; set it to false"):
        set_gradient_checkpointing(net, True)
    assert not uses_gradient_checkpointing(net)


def compile_layers(net: TextClassifier, backend: str) -> None:
    for layer in find_layers(net):
        layer.compile(dynamic=True, backend=backend)


@pytest.fixture
def dynamo(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """torch.compile warns of its own deprecated calls, and asks tensors for gradients that they do not have."""
    warnings.simplefilter("ignore")
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("kind", ["bert", pytest.param("modernbert", marks=pytest.mark.slow)])
def test_compiled_layers_have_the_same_gradients_when_recomputed(kind: str) -> None:
    net = make_net(kind, gradient_checkpointing=True)
    expected = gradients(net)
    compile_layers(net, "aot_eager")
    torch.testing.assert_close(gradients(net), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("dynamo")
def test_compiled_layers_are_recomputed_while_it_is_on() -> None:
    net = make_net("bert")
    calls: list[int] = []
    layer = net.model.get_submodule("bert.encoder.layer.0")  # the last one stays eager
    layer.output.register_forward_pre_hook(lambda *_: calls.append(1))
    compile_layers(net, "eager")
    assert compiled_call(layer) is not None
    found = []
    for on in (False, True, False):
        set_gradient_checkpointing(net, on)
        gradients(net)
        found.append(len(calls))
        calls.clear()
    assert found == [2, 4, 2]  # micro-batches, each forward, and in the backward pass where it is on


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("lora", [None, LORA], ids=["plain", "lora"])
def test_switching_compiled_layers_changes_no_gradient(lora: LoRAConfig | None) -> None:
    net = make_net("bert", lora=lora)
    expected = gradients(net)
    compile_layers(net, "aot_eager")
    for on in (False, True, False):
        set_gradient_checkpointing(net, on)
        torch.testing.assert_close(gradients(net), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.usefixtures("dynamo")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_gpu_recomputed_layers_have_the_same_gradients(kind: str, compiled: bool) -> None:
    net = make_net(kind, dropout=0.0 if compiled else 0.3).cuda()
    micro = micro_batch(random_sequences((90, 70, 5))).to("cuda")

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        with torch.autocast("cuda", torch.bfloat16):
            net(micro).square().sum().backward()
        found = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        net.zero_grad()
        return found

    expected = run()
    set_gradient_checkpointing(net, True)
    if compiled:
        compile_layers(net, "inductor")
    for found, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))
