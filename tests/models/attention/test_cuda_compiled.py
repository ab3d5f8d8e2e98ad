"""Compiled layers with the flash operators: one graph serves all rates of dropout and all lengths."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from lightning_bge.callbacks.compile.layers import compile_layers
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.models.attention import packed as attention
from lightning_bge.models.dropout import CheapDropout, use_cheap_dropout
from tests.helpers.packing import CPU, CUDA, on_gpu, pack

# inductor of torch 2.13 imports what torch 2.13 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

LENGTHS = (7, 5, 5, 5, 1)


def bert_layers(number: int) -> nn.ModuleList:
    config = BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16)
    config._attn_implementation = attention.PACKED
    attention.register_packed_attention()
    layers = nn.ModuleList(BertLayer(config) for _ in range(number))
    use_cheap_dropout(layers)
    for module in layers.modules():
        if isinstance(module, CheapDropout) and not hasattr(module, "host_rate"):
            module.host_rate = torch.empty((), dtype=torch.float64)
    return layers


def set_rate(layers: nn.Module, rate: float) -> None:
    for module in layers.modules():
        if isinstance(module, CheapDropout):
            module.p = rate
            module.host_rate.fill_(rate)


def step(layers: nn.ModuleList, lengths: tuple[int, ...], device: torch.device = CPU) -> Tensor:
    hidden = torch.randn(1, sum(lengths), 16, device=device, requires_grad=True)
    out = hidden
    layers.zero_grad()
    for layer in layers:
        out = layer(out, packing=pack(lengths, device))
    out.float().sum().backward()
    return out


def warm_up(layers: nn.ModuleList, device: torch.device = CPU) -> None:
    for lengths, rate in (((50, 30), 0.1), ((140, 30, 9), 0.2), ((300, 20, 10), 0.3)):
        set_rate(layers, rate)
        step(layers, lengths, device)


def outputs(layers: nn.ModuleList, rate: float, lengths: tuple[int, ...], device: torch.device, seed: int) -> Tensor:
    """Of one step on the same input always, with masks of the given seed."""
    set_rate(layers, rate)
    hidden = torch.randn(1, sum(lengths), 16, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    torch.manual_seed(seed)
    out = hidden
    for layer in layers:
        out = layer(out, packing=pack(lengths, device))
    out.float().sum().backward()
    return out.detach().float().clone()  # a CUDA graph writes into the same memory when it is replayed


def check_rates(layers: nn.ModuleList, eager: nn.ModuleList, lengths: tuple[int, ...], device: torch.device) -> None:
    """Compiled layers drop at the rate of now, with other masks in each step, and nothing at rate 0."""
    exact, near = outputs(eager, 0.0, lengths, device, 0), {"rtol": 2e-2, "atol": 5e-2}
    distances = []
    for rate in (0.05, 0.15, 0.4):
        one, other = (outputs(layers, rate, lengths, device, seed) for seed in (1, 2))
        assert not torch.allclose(one, other, **near)
        distances.append(float((one - exact).square().mean()))
        of_eager = float((outputs(eager, rate, lengths, device, 1) - exact).square().mean())
        assert distances[-1] == pytest.approx(of_eager, rel=0.35)  # another mask, the same rate
        torch.testing.assert_close(outputs(layers, 0.0, lengths, device, 3), exact, **near)
    assert distances == sorted(distances)


@pytest.fixture
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_layer_holds_the_flash_call_and_takes_every_rate(
    flash_calls: list[dict], monkeypatch: pytest.MonkeyPatch, fresh_graphs: None
) -> None:
    monkeypatch.setattr(attention, "_fits_into_graphs", lambda *_: True)
    layers = bert_layers(2).train()
    for layer in layers:
        layer.compile(fullgraph=True, backend="eager")
    warm_up(layers)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rate in (0.05, 0.15, 0.0):
            for lengths in ((500, 499, 3), (129, 1, 1)):
                flash_calls.clear()
                set_rate(layers, rate)
                step(layers, lengths)
                assert [call["rate"] for call in flash_calls] == [rate, rate]
                assert flash_calls[0]["max_q"] == {500: 512, 129: 256}[lengths[0]]
    layers.eval()
    flash_calls.clear()
    set_rate(layers, 0.5)
    step(layers, LENGTHS)
    assert [call["rate"] for call in flash_calls] == [0.0, 0.0]


def test_a_compiled_layer_drops_at_the_rate_of_now_and_draws_anew(
    flash_calls: list[dict], monkeypatch: pytest.MonkeyPatch, fresh_graphs: None
) -> None:
    monkeypatch.setattr(attention, "_fits_into_graphs", lambda *_: True)
    layers = bert_layers(2).train()
    eager = copy.deepcopy(layers)
    compile_layers(layers, CompileConfig(policy="always", backend="aot_eager"))
    warm_up(layers)
    with torch.compiler.set_stance("fail_on_recompile"):
        check_rates(layers, eager, (140, 30, 9), CPU)


def test_operators_that_read_a_rate_stay_out_of_cuda_graphs() -> None:
    """A replayed CUDA graph would not read the rate again."""
    operators = torch.ops.lightning_bge
    for operator in (operators.flash_attention, operators.flash_attention_backward):
        assert torch.Tag.cudagraph_unsafe in operator.default.tags
    assert torch.Tag.nondeterministic_seeded in operators.flash_attention.default.tags


def test_a_compiled_layer_equals_the_layer(
    flash_calls: list[dict], monkeypatch: pytest.MonkeyPatch, fresh_graphs: None
) -> None:
    monkeypatch.setattr(attention, "_fits_into_graphs", lambda *_: True)
    layers = bert_layers(1)
    set_rate(layers, 0.0)
    torch.manual_seed(0)
    plain = step(layers, LENGTHS)
    wanted = [parameter.grad.clone() for parameter in layers.parameters()]
    layers[0].compile(fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    torch.testing.assert_close(step(layers, LENGTHS), plain, rtol=1e-5, atol=1e-6)
    assert len(flash_calls) == 1
    for parameter, grad in zip(layers.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_gpu_a_compiled_layer_takes_every_rate_and_draws_anew(mode: Any, fresh_graphs: None) -> None:
    layers = bert_layers(2).cuda().train()
    eager = copy.deepcopy(layers)
    compile_layers(layers, CompileConfig(policy="always", mode=mode))
    lengths = (140, 30, 9)  # of the warm-up: with reduce-overhead other totals are compiled anew
    with torch.autocast("cuda", dtype=torch.bfloat16):
        warm_up(layers, CUDA)
        with torch.compiler.set_stance("fail_on_recompile"):
            check_rates(layers, eager, lengths, CUDA)


@pytest.mark.gpu
@on_gpu
def test_gpu_a_layer_compiled_by_default_takes_new_lengths(fresh_graphs: None) -> None:
    layers = bert_layers(2).cuda().train()
    compile_layers(layers, CompileConfig(policy="always"))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        warm_up(layers, CUDA)
        with torch.compiler.set_stance("fail_on_recompile"):
            for lengths in ((500, 499, 3), (129, 1, 1)):
                assert step(layers, lengths, CUDA).isfinite().all()
