"""Recompilations are counted, and one graph serves all trials of an encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from lightning_bge.callbacks.compile import policy as policy_module
from lightning_bge.callbacks.compile.callback import CompileLayers
from lightning_bge.callbacks.compile.layers import find_layers
from lightning_bge.callbacks.compile.policy import (
    CompileConfig,
)
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.dropout import CheapDropout
from lightning_bge.models.encoder import TextClassifier
from lightning_bge.models.optimizer import OptimizerConfig
from lightning_bge.runtime.compat.torch import compiled_call, set_compiled_call
from lightning_bge.types import Batch, Schema
from tests.helpers.small_models import Batches, cut_batch, quiet_trainer, random_sequences, small_model
from tests.helpers.stacks import EAGER, compiled, stack, train

pytestmark = [
    pytest.mark.usefixtures("forgetful"),
    # dynamo asks every tensor for its gradient and hides the warning of that in a way that an error filter goes around
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # inductor of torch 2.13 imports what torch 2.13 deprecates
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


def test_graphs_are_counted() -> None:
    callback = CompileLayers(EAGER)
    module = stack()
    train(module, callback)
    assert callback.graphs > 0
    train(module, callback)
    assert callback.graphs == 0


RATES = (0.1, 0.0, 0.3, 0.5, 0.01)
SIZES = (6, 1, 8, 3, 5)
SCHEMA = Schema("binary", ("no", "yes"), ("text",), 64)


def effective_batch(size: int, seed: int, pieces: int = 2) -> Batch:
    lengths = torch.randint(2, 12, (size,), generator=torch.Generator().manual_seed(seed)).tolist()
    return cut_batch(random_sequences(lengths, seed=seed), (torch.arange(size) % 2).float(), pieces)


def set_dropout(net: nn.Module, rate: float) -> None:
    for part in net.modules():
        if isinstance(part, CheapDropout):
            part.p = rate
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = rate


class TrialsOnOneEncoder:
    """Trials as a search runs them: one warm encoder, its weights reset in place."""

    def __init__(self, kind: str, backend: str) -> None:
        self.net = TextClassifier(small_model(kind, dropout=0.1, vocab_size=100))
        self.start = {name: value.clone() for name, value in self.net.state_dict().items()}
        self.config = CompileConfig(policy="always", backend=backend)

    def run(self, number: int) -> CompileLayers:
        rate, size = RATES[number % len(RATES)], SIZES[number // 4 % len(SIZES)]
        self.net.load_state_dict(self.start)
        set_dropout(self.net, rate)
        module = BGEClassifier(optimizer=OptimizerConfig(lr=1e-5 * (number + 1)), seed=number)
        module.net = self.net
        batches = [effective_batch(size, seed=10 * number + k, pieces=1 + k % 3) for k in range(2)]
        callback = CompileLayers(self.config)
        trainer = quiet_trainer(callbacks=[callback], max_epochs=2)
        trainer.fit(module, datamodule=Batches(SCHEMA, batches, [effective_batch(4, seed=number)]))
        assert trainer.global_step == 4
        assert "val_loss" in trainer.callback_metrics
        assert callback.in_effect
        return callback


def loss_and_gradients(net: TextClassifier) -> list[Tensor]:
    net.train().zero_grad()
    loss = torch.stack([net(micro).square().mean() for micro in effective_batch(7, seed=0).micro]).sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def run_trials(kind: str, backend: str, trials: int) -> None:
    study = TrialsOnOneEncoder(kind, backend)
    first = study.run(0)
    assert first.graphs > 0
    with torch.compiler.set_stance("fail_on_recompile"):
        later = [study.run(number) for number in range(1, trials)]
        set_dropout(study.net, 0.0)
        found = loss_and_gradients(study.net)
    assert {callback.graphs for callback in later} == {0}
    for layer in find_layers(study.net):
        set_compiled_call(layer, None)
    for one, other in zip(found, loss_and_gradients(study.net), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_one_graph_serves_20_trials() -> None:
    """Another dropout, batch size, cut and learning rate in each; training and validation in turns; results equal."""
    run_trials("bert", "aot_eager", trials=20)


def eager_backend(graph: torch.fx.GraphModule, inputs: Any, **_: Any) -> Callable[..., Any]:
    return graph.forward


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_new_token_totals_need_no_graph(mode: Any) -> None:
    module, callbacks = BGEClassifier(), []
    module.net = TextClassifier(small_model("bert", vocab_size=100))
    config = CompileConfig(policy="always", mode=mode, backend=eager_backend)  # type: ignore[arg-type]
    for seed in range(3):  # the second run has no new total, the third one has
        batches = [effective_batch(6, seed=max(seed, 1))] * 2
        callbacks.append(CompileLayers(config))
        quiet_trainer(callbacks=callbacks[-1:], limit_val_batches=0).fit(module, datamodule=Batches(SCHEMA, batches))
    first, repeated, new = (callback.graphs for callback in callbacks)
    if not first > 0 or repeated:
        pytest.fail(f"{first} graphs of the first batches, and {repeated} of the same ones")
    assert new == 0


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_cuda_graphs_are_recorded_for_few_token_totals(mode: Any) -> None:
    module, fed = BGEClassifier(), set()
    module.net = net = TextClassifier(small_model("bert", vocab_size=100))
    net.model.base_model.embeddings.register_forward_hook(lambda part, inputs, output: fed.add(output.shape[1]))
    batches = [effective_batch(6, seed=seed) for seed in range(2)]
    callback = CompileLayers(CompileConfig(policy="always", mode=mode, backend=eager_backend))  # type: ignore[arg-type]
    quiet_trainer(callbacks=[callback], limit_val_batches=0).fit(module, datamodule=Batches(SCHEMA, batches))
    assert fed == {1024} if mode == "reduce-overhead" else len(fed) > 1
    assert net.token_bucket is None  # after the fit, in which alone it was set


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "backend"), [("bert", "inductor"), ("modernbert", "aot_eager")])
def test_one_graph_serves_20_trials_slow(kind: str, backend: str) -> None:
    run_trials(kind, backend, trials=20)


@pytest.mark.slow
def test_the_decision_of_auto_on_this_machine_agrees_with_what_it_measured() -> None:
    module = BGEClassifier()
    module.net = TextClassifier(small_model("bert", dropout=0.1))
    batches = [effective_batch(6, seed=k) for k in range(14)]
    callback = CompileLayers(CompileConfig(time_limit=100), steps_left=10**6)
    quiet_trainer(callbacks=[callback]).fit(module, datamodule=Batches(SCHEMA, batches, batches[:1]))
    measured = callback.found.measured
    assert measured is not None, callback.reason
    pays = 2 * 10**6 * (measured.eager_s - measured.compiled_s) > 2 * measured.compile_s  # two layers, two graphs
    assert callback.in_effect is pays, callback.reason
    assert callback.reason.startswith("compile on: " if pays else "compile off: ")
    assert callback.in_effect is all(compiled_call(layer) is not None for layer in find_layers(module))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", ["auto", "always"])
def test_gpu_layers_are_measured_by_auto_and_compiled_by_always(monkeypatch: pytest.MonkeyPatch, policy: Any) -> None:
    monkeypatch.setattr(policy_module, "MIN_COMPILE_S", 0.0)
    callback, module = CompileLayers(CompileConfig(policy=policy), steps_left=10**9), stack()
    train(module, callback, accelerator="gpu", devices=1)
    assert compiled(module) == [callback.in_effect] * 3
    assert callback.in_effect if policy == "always" else callback.found.measured is not None, callback.reason
