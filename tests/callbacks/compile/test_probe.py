"""The measurement of one layer: what it changes, how long it takes, and what it returns."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_bge.callbacks.compile import callback as compile_module
from lightning_bge.callbacks.compile import policy as policy_module
from lightning_bge.callbacks.compile.callback import CompileLayers
from lightning_bge.callbacks.compile.layers import signature
from lightning_bge.callbacks.compile.policy import (
    CompileConfig,
)
from lightning_bge.callbacks.compile.probe import (
    Capture,
    TimeLimitExceeded,
    limit_time,
    measure,
)
from lightning_bge.runtime.compat.torch import compiled_call
from tests.helpers.stacks import EAGER, Block, compiled, stack, train

pytestmark = [
    pytest.mark.usefixtures("forgetful"),
    # dynamo asks every tensor for its gradient and hides the warning of that in a way that an error filter goes around
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # inductor of torch 2.13 imports what torch 2.13 deprecates
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


class Grads(Callback):
    """The gradients of each step, and the random numbers that come after it."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen += [p.grad.clone() for p in pl_module.parameters() if p.grad is not None]

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(torch.get_rng_state())


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_try_changes_no_result(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(policy_module, "MIN_COMPILE_S", 0.0)
    monkeypatch.setattr(compile_module, "decide", lambda *_: (False, "off"))
    autocast: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        autocast.append(torch.is_autocast_enabled("cpu"))
        return graph.forward

    callback = CompileLayers(CompileConfig(backend=backend), steps_left=10**9)  # type: ignore[arg-type]
    plain, tried, grads, grads_tried = stack(), stack(), Grads(), Grads()
    torch.manual_seed(5)
    train(plain, grads, precision=precision)
    torch.manual_seed(5)
    train(tried, callback, grads_tried, precision=precision)
    assert autocast
    assert all(on is (precision == "bf16-mixed") for on in autocast)
    assert callback.reason == "off"
    assert callback.found.measured is not None
    assert callback.found.measured.compile_s > 0
    assert compiled(tried) == [False] * 3
    assert not any(layer._forward_pre_hooks for layer in tried.layers)
    assert equal(grads.seen, grads_tried.seen)
    assert equal(list(plain.state_dict().values()), list(tried.state_dict().values()))


class Sleeper:
    """A back end that takes forever."""

    def __init__(self) -> None:
        self.called = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.called += 1
        while True:
            time.sleep(0.01)


def test_a_try_is_broken_off_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_module, "MIN_COMPILE_S", 0.0)
    sleeper = Sleeper()
    config = CompileConfig(time_limit=0.5, backend=sleeper)  # type: ignore[arg-type]
    callback, plain, tried = CompileLayers(config, steps_left=10**12), stack(), stack()
    before = signal.getsignal(signal.SIGALRM)
    torch.manual_seed(5)
    train(plain)
    torch.manual_seed(5)
    train(tried, callback)
    assert sleeper.called == 1
    assert callback.reason == "compile off: one layer was not compiled within 500 ms"
    assert compiled(tried) == [False] * 3
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert equal(list(plain.state_dict().values()), list(tried.state_dict().values()))
    train(tried, CompileLayers(EAGER))  # torch.compile is whole again
    assert compiled(tried) == [True] * 3


def test_another_timer_is_put_back() -> None:
    rung: list[int] = []
    old = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 1000, 7)
        with pytest.raises(TimeLimitExceeded), limit_time(0.01):
            threading.Event().wait(60)
        remaining, interval = signal.getitimer(signal.ITIMER_REAL)
        assert 0 < remaining <= 1000
        assert interval == 7
        signal.raise_signal(signal.SIGALRM)
        assert rung == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_medians_of_turns() -> None:
    """The clock says how long a call took by whether it was compiled, and the first compiled one takes 10 s more."""
    layer, now, modes = Block(), [0.0], []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        now[0] += 10
        return graph.forward

    def note(*_: Any) -> None:
        modes.append(compiled_call(layer) is not None)
        now[0] += 2 if modes[-1] else 3

    capture = Capture(layer)
    layer(torch.randn(4, 6, requires_grad=True))
    layer(torch.randn(5, 6))
    capture.close()
    monkeypatched = capture.replay
    capture.replay = lambda: (note(), monkeypatched())  # type: ignore[method-assign]
    found = measure(capture, lambda layer: layer.compile(backend=backend, dynamic=True), 100, lambda: now[0])
    assert (found.eager_s, found.compiled_s) == (3, 2)
    assert found.compile_s >= 10
    assert modes == [False, False, True, True, *[True, False] * 5]
    assert layer._compiled_call_impl is None
    assert all(p.grad is None for p in layer.parameters())


class Recorded(torch.autograd.Function):
    """Doubles its input; keeps the inputs of its forward passes, and the gradients of its backward passes."""

    forwards: list[Tensor]
    backwards: list[Tensor]

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        Recorded.forwards.append(hidden.detach().clone())
        return 2 * hidden

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Recorded.backwards.append(grad.clone())
        return 2 * grad


class RecordedLayer(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return Recorded.apply(super().forward(hidden))


@pytest.mark.parametrize(("trains", "input_trains"), [(True, False), (False, True), (True, True), (False, False)])
def test_captured_calls_are_replayed_forward_and_also_backward_unless_all_is_frozen(
    trains: bool, input_trains: bool
) -> None:
    layer = RecordedLayer(6, 6).requires_grad_(trains)
    capture = Capture(layer)
    inputs = [torch.randn(rows, 6, requires_grad=input_trains) for rows in (4, 5)]
    Recorded.forwards, Recorded.backwards = [], []
    for hidden in inputs:
        layer(hidden)
    capture.close()
    expected, Recorded.forwards = Recorded.forwards, []
    layer(torch.randn(3, 6))  # a call of a later batch
    assert len(capture.calls) == 2
    Recorded.forwards = []
    with torch.no_grad():  # whatever the caller's mode is
        capture.replay()
    assert [part.shape for part in expected] == [(4, 6), (5, 6)]
    assert equal(Recorded.forwards, expected)
    assert equal(Recorded.backwards, [torch.ones_like(part) for part in expected] if trains or input_trains else [])
    assert [tensor.grad for tensor in (*layer.parameters(), *inputs)] == [None] * 4


def test_a_signature_is_of_structure_alone() -> None:
    one, other = Block(), Block()
    other.dropout.p = 0.1
    assert signature(one) == signature(other.eval())
    other.flag = True
    assert signature(one) != signature(other)
    assert signature(one) != signature(Block().requires_grad_(False))
    assert signature(one) != signature(Block().double())
