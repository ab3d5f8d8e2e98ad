"""The compile policy, in a project that knows nothing of ours; and one graph for all trials of our own encoder."""

from __future__ import annotations

import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_model
from torch import Tensor, nn

from lightning_bge.callbacks.compile import callback as compile_module
from lightning_bge.callbacks.compile import policy as policy_module
from lightning_bge.callbacks.compile import probe as probe_module
from lightning_bge.callbacks.compile.callback import CompileLayers
from lightning_bge.callbacks.compile.layers import find_layers, make_eager, signature
from lightning_bge.callbacks.compile.policy import (
    CompileConfig,
    Findings,
    decide,
    format_seconds,
    probe_time_limit,
    too_short,
)
from lightning_bge.callbacks.compile.probe import (
    Capture,
    Measured,
    TimeLimitExceeded,
    limit_time,
    measure,
    missing_tool,
)
from lightning_bge.errors import ConfigError
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.dropout import CheapDropout
from lightning_bge.models.encoder import TextClassifier
from lightning_bge.models.optimizer import OptimizerConfig
from lightning_bge.runtime.compat.torch import compiled_call
from lightning_bge.types import Batch, Schema
from tests.helpers.small_models import Batches, Loader, cut_batch, quiet_trainer, random_sequences, small_model

pytestmark = [
    # dynamo asks every tensor for its gradient and hides the warning of that in a way that an error filter goes around
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # inductor of torch 2.13 imports what torch 2.13 deprecates
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

EAGER = CompileConfig(policy="always", backend="eager")


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process remembers is forgotten between tests; torch, too, has a limit of graphs for a function."""
    torch.compiler.reset()
    monkeypatch.setattr(compile_module, "_findings", {})
    monkeypatch.setattr(compile_module, "_logged", {})


class Block(nn.Module):
    """A layer with all that a probe might disturb: random numbers, and buffers that change in training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.word = ""

    def forward(self, hidden: Tensor, *, factor: Tensor | None = None) -> Tensor:
        out = self.dropout(self.norm(self.linear(hidden))) + len(self.word)
        return hidden + (out if factor is None else out * factor)


class Stack(LightningModule):
    """A module as anybody writes it."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.heads = nn.ModuleList([nn.Linear(6, 1), nn.Identity()])

    def forward(self, batch: Tensor) -> Tensor:
        for layer in self.layers:
            batch = layer(batch, factor=batch.mean())
        return self.heads[0](batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Slow(Stack):
    """2 s a training batch on a clock that stands still otherwise, but for 50 s a validation batch."""

    now = 100.0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        Slow.now += 2
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        Slow.now += 50


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The clock of `Slow`; and what is compiled runs eager, as only the decision matters."""
    monkeypatch.setattr(compile_module, "_clock", lambda: Slow.now)
    with torch.compiler.set_stance("force_eager"):
        yield


def train(module: LightningModule, *callbacks: Callback, steps: int = 20, **options: Any) -> Trainer:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4 + number % 3, 6, generator=generator) for number in range(steps)]
    trainer = quiet_trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, Loader(batches), Loader(batches[:2]))
    return trainer


def stack(kind: type[Stack] = Stack, seed: int = 3) -> Stack:
    torch.manual_seed(seed)
    return kind()


def compiled(module: Stack) -> list[bool]:
    return [compiled_call(layer) is not None for layer in module.layers]


def fake(monkeypatch: pytest.MonkeyPatch, *results: Measured | BaseException) -> list[float]:
    """Measurements to give out, one a call; returns the list of the time limits that were asked for."""
    limits: list[float] = []
    left = list(results)

    def measure_(capture: Capture, compile_: Any, time_limit: float, clock: Any) -> Measured:
        assert len(capture.calls) == 1
        limits.append(time_limit)
        if isinstance(result := left.pop(0), Measured):
            return result
        raise result

    monkeypatch.setattr(compile_module, "measure", measure_)
    # a few steps of the fake clock are worth a try, for a sixth of what is left
    monkeypatch.setattr(policy_module, "MIN_PROBE_S", 0.0)
    monkeypatch.setattr(policy_module, "MAX_PROBE_SHARE", 1 / 6)
    return limits


# ------------------------------------------------------------------ settings, layers, tools


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "on"}, "compile.policy: expected one of auto, always, never, got on"),
        ({"mode": "fast"}, "compile.mode: expected one of default, reduce-overhead, max-autotune, got fast"),
        ({"time_limit": 0}, "compile.time_limit: expected seconds above 0, got 0"),
        ({"time_limit": math.inf}, "compile.time_limit"),
        ({"time_limit": math.nan}, "compile.time_limit"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompileConfig(**settings)


def test_steps_left_are_not_negative() -> None:
    with pytest.raises(ConfigError, match="steps_left: expected optimizer steps, 0 or more, got -1"):
        CompileLayers(steps_left=-1)


def test_the_layers_are_the_longest_list_of_one_class() -> None:
    module = Stack()
    assert find_layers(module) == list(module.layers)
    assert find_layers(nn.ModuleList([nn.Linear(1, 1), nn.ReLU()])) == []
    assert find_layers(nn.Sequential(nn.ModuleList())) == []
    model = small_model("bert")
    assert find_layers(model) == list(model.bert.encoder.layer)


def test_a_module_without_layers(caplog: pytest.LogCaptureFixture) -> None:
    class Plain(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*self.layers)
            self.heads = nn.Sequential(*self.heads)

        def forward(self, batch: Tensor) -> Tensor:
            return self.heads(self.layers(batch))

    with pytest.raises(ConfigError, match=r"always, but Plain has no nn\.ModuleList of one class of modules"):
        train(Plain(), CompileLayers(EAGER))
    callback, module = CompileLayers(CompileConfig(backend="eager")), Plain()
    with caplog.at_level(logging.INFO):
        train(module, callback)
        train(module, callback)
    assert callback.reason.startswith("compile off: Plain has no nn.ModuleList")
    assert caplog.messages.count(callback.reason) == 1
    chosen = CompileLayers(EAGER, layers=lambda module: list(module.layers))
    train(module, chosen)
    assert chosen.in_effect
    assert compiled(module) == [True] * 3


@pytest.mark.parametrize(
    ("device", "setup", "message"),
    [
        ("cpu", {"found": ["g++"]}, None),
        ("cpu", {"found": []}, "no C++ compiler g++"),
        ("cpu", {"found": ["g++"], "CXX": "icpx"}, "no C++ compiler icpx"),
        ("cpu", {"found": ["icpx"], "CXX": "icpx"}, None),
        ("cuda", {"found": ["gcc"], "triton": True}, None),
        ("cuda", {"found": ["gcc"], "triton": False}, "no triton"),
        ("cuda", {"found": ["g++"], "triton": True}, "no C compiler, which triton needs"),
        ("mps", {"found": ["g++"]}, "not measured on mps"),
    ],
)
def test_what_a_compilation_needs(
    monkeypatch: pytest.MonkeyPatch, device: str, setup: dict[str, Any], message: str | None
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name if name in setup["found"] else None)
    monkeypatch.setattr(probe_module, "has_triton", lambda: setup["triton"])
    monkeypatch.setattr(probe_module.sys, "platform", "linux")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    if "CXX" in setup:
        monkeypatch.setenv("CXX", setup["CXX"])
    found = missing_tool(torch.device(device), "inductor")
    assert found is None if message is None else message in str(found)
    assert missing_tool(torch.device(device), "eager") is None


def test_without_a_compiler_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_module, "missing_tool", lambda *_: "there is no compiler: install it")
    limits = fake(monkeypatch)
    callback, module = CompileLayers(steps_left=10**9), Stack()
    train(module, callback)
    assert callback.reason == "compile off: there is no compiler: install it"
    assert compiled(module) == [False] * 3
    assert limits == []
    with pytest.raises(ConfigError, match="always, but there is no compiler: install it; or set the policy to auto"):
        train(module, CompileLayers(CompileConfig(policy="always")))


# ------------------------------------------------------------------ never and always


def test_never_touches_nothing() -> None:
    callback, module = CompileLayers(CompileConfig(policy="never")), Stack()
    train(module, callback)
    assert compiled(module) == [False] * 3
    assert callback.describe() == {
        "policy": "never",
        "mode": "default",
        "backend": "inductor",
        "in_effect": False,
        "reason": "compile off: the policy is never",
        **dict.fromkeys(("layers", "graphs", "recompiles", "eager_functions"), 0),
        **dict.fromkeys(("step_ms", "compile_s", "saved_ms")),
    }


def test_always_compiles_in_place_once_and_changes_no_key(tmp_path: Path) -> None:
    module, plain, callback = stack(), stack(), CompileLayers(EAGER)
    trainer = train(module, callback)
    train(plain)
    assert callback.in_effect
    assert compiled(module) == [True] * 3
    first = [layer._compiled_call_impl for layer in module.layers]
    again = CompileLayers(EAGER)
    train(module, again)
    train(plain)
    assert [layer._compiled_call_impl for layer in module.layers] == first
    assert again.reason == "compile on: the layers are compiled already"

    assert list(module.state_dict()) == list(plain.state_dict())
    trainer.save_checkpoint(tmp_path / "it.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "it.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == list(plain.state_dict())
    plain.load_state_dict(module.state_dict())
    for name, kind in (("compiled", module), ("plain", plain)):
        save_model(kind, str(tmp_path / name))
    assert (tmp_path / "compiled").read_bytes() == (tmp_path / "plain").read_bytes()
    make_eager(module.layers)
    assert compiled(module) == [False] * 3


def test_compiled_training_equals_eager_training() -> None:
    module, plain = stack(), stack()
    for net in (module, plain):
        for layer in net.layers:
            layer.dropout.p = 0.0
    train(module, CompileLayers(EAGER), max_epochs=2)
    train(plain, max_epochs=2)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], msg=name)


@pytest.mark.parametrize(("mode", "dynamic"), [("default", True), ("reduce-overhead", False), ("max-autotune", True)])
def test_cuda_graphs_are_static(monkeypatch: pytest.MonkeyPatch, mode: Any, dynamic: bool) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append(options))
    train(Stack(), CompileLayers(CompileConfig(policy="always", mode=mode, backend="eager")))
    assert asked == [{"dynamic": dynamic, "mode": mode, "backend": "eager"}] * 3


# ------------------------------------------------------------------ arithmetic


def findings(**changes: Any) -> Findings:
    return Findings(**{"graphs": 2, "step_s": 0.031, **changes})


def test_too_few_steps_are_not_worth_a_try() -> None:
    assert too_short(findings(), 380) == (
        "compile off: 380 steps left x at most 0.50 of 31 ms a step = 5.89 s could be saved, "
        "compiling takes at least 4 s"
    )
    assert too_short(findings(), 390) == (
        "compile off: 390 steps left x 31 ms a step = 12.1 s; to measure it takes at least 8 s, more than 2% of that"
    )
    assert too_short(findings(), 13_000) is None  # 403 s
    assert too_short(findings(), math.inf) is None


def test_a_try_takes_a_small_share_of_the_time_left() -> None:
    config = CompileConfig(time_limit=120)
    assert probe_time_limit(findings(), 6_000, config) == pytest.approx(6_000 * 0.031 * 0.02)
    assert probe_time_limit(findings(), 10**6, config) == 120
    assert probe_time_limit(findings(), math.inf, config) == 120


MEASURED = Measured(compile_s=17.0, eager_s=0.0050, compiled_s=0.0030)


@pytest.mark.parametrize(
    ("steps", "on", "text"),
    [
        (
            190_000,
            True,
            "compile on: 34 s to compile 2 graphs, 12 ms saved a step, breaks even after 2,833 of 190,000 steps left: "
            "saves 37.4 min",
        ),
        (
            4_249,
            False,
            "compile off: 34 s to compile 2 graphs, 12 ms saved a step, breaks even after 2,833 steps, "
            "needed within 2,833 of 4,249 steps left",
        ),
        (4_251, True, "compile on: 34 s to compile 2 graphs, 12 ms saved a step, breaks even after 2,833 of 4,251"),
        (math.inf, True, "compile on: 34 s to compile 2 graphs, 12 ms saved a step, breaks even after 2,833 of unl"),
    ],
)
def test_compiling_must_pay_by_a_margin(steps: float, on: bool, text: str) -> None:
    found, reason = decide(findings(measured=MEASURED), 6, steps)
    assert found is on
    assert reason.startswith(text)


def test_nothing_to_save() -> None:
    on, reason = decide(findings(measured=Measured(17.0, 0.003, 0.0031)), 6, math.inf)
    assert not on
    assert reason == "compile off: a layer's part of a batch takes 3.1 ms compiled, 3 ms eager: nothing to save"


def test_batches_of_a_step_count() -> None:
    assert findings(measured=MEASURED, batches=4).saved_s(6) == pytest.approx(0.048)


def test_times_are_readable() -> None:
    seconds = (0.0121, 15, 179, 200, 7100, 90_000, math.inf)
    assert [format_seconds(s) for s in seconds] == [
        "12.1 ms",
        "15 s",
        "179 s",
        "3.33 min",
        "118 min",
        "25 h",
        "unlimited time",
    ]


# ------------------------------------------------------------------ auto


AUTO = CompileConfig(backend="eager")
PAYS = Measured(compile_s=1.0, eager_s=0.5, compiled_s=0.25)


@pytest.mark.usefixtures("clock")
def test_auto_times_steps_tries_and_compiles(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    limits = fake(monkeypatch, PAYS)
    callback, module = CompileLayers(AUTO, steps_left=300), stack(Slow)
    with caplog.at_level(logging.INFO):
        train(module, callback, val_check_interval=2)
    # 3 steps to warm up, 8 timed, 1 watched: 288 are left; 288 * 2 s / 6
    assert limits == [96]
    assert compiled(module) == [True] * 3
    assert callback.reason == (
        "compile on: 2 s to compile 2 graphs, 750 ms saved a step, "
        "breaks even after 3 of 288 steps left: saves 3.57 min"
    )
    assert callback.reason in caplog.messages
    told = callback.describe()
    assert told["in_effect"]
    assert (told["layers"], told["step_ms"], told["compile_s"], told["saved_ms"]) == (3, 2000, 1, pytest.approx(750))
    assert (told["recompiles"], told["eager_functions"]) == (0, 0)


@pytest.mark.usefixtures("clock")
def test_steps_left_are_those_of_this_fit_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, callback = fake(monkeypatch), CompileLayers(AUTO)
    train(stack(Slow), callback, steps=16)
    assert callback.reason == (
        "compile off: 5 steps left x at most 0.50 of 2 s a step = 5 s could be saved, compiling takes at least 4 s"
    )
    assert limits == []
    fake(monkeypatch, PAYS)
    train(stack(Slow), callback, max_epochs=4)
    assert "of 80 steps left" not in callback.reason  # one of them was watched
    assert "of 79 steps left" in callback.reason


@pytest.mark.usefixtures("clock")
def test_it_is_measured_once_a_process(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    limits, module = fake(monkeypatch, PAYS), stack(Slow)
    caplog.set_level(logging.INFO)
    first, second, third = (CompileLayers(AUTO, steps_left=steps) for steps in (300, 2, 2))
    train(module, first)
    train(module, second, steps=1)  # a warm encoder
    train(stack(Slow, seed=4), third, steps=1)  # a fresh one of the same kind: its graphs are there
    assert len(limits) == 1
    assert [callback.reason for callback in (second, third)] == [first.reason] * 2
    assert second.in_effect
    assert third.in_effect
    assert caplog.messages.count(first.reason) == 1

    other = CompileLayers(AUTO, steps_left=300)
    train(stack(Slow), other, precision="bf16-mixed", steps=1)  # another kind: it begins anew
    assert other.reason == "compile off: training ended before it was decided"


@pytest.mark.usefixtures("clock")
def test_off_is_decided_anew_for_more_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = fake(monkeypatch, Measured(compile_s=30.0, eager_s=0.5, compiled_s=0.25))
    callback = CompileLayers(AUTO, steps_left=60)
    train(stack(Slow), callback)
    assert callback.reason.startswith(
        "compile off: 60 s to compile 2 graphs, 750 ms saved a step, breaks even after 80"
    )
    callback = CompileLayers(AUTO, steps_left=6000)
    train(stack(Slow), callback)
    assert callback.in_effect
    assert len(limits) == 1


@pytest.mark.usefixtures("clock")
def test_out_of_time_is_tried_again_with_more_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = fake(monkeypatch, TimeLimitExceeded(), TimeLimitExceeded(), PAYS)
    config = CompileConfig(backend="eager", time_limit=50)
    reasons = []
    for steps in (112, 112, 90, 10_000, 10_000):
        callback, module = CompileLayers(config, steps_left=steps), stack(Slow)
        train(module, callback)
        reasons.append(callback.reason)
        assert compiled(module) == [False] * 3
    assert limits == [pytest.approx(100 / 3), pytest.approx(50)]
    assert reasons[0] == ("compile off: one layer was not compiled within 33.3 s, 2% of the time that is left")
    assert reasons[3] == reasons[4] == "compile off: one layer was not compiled within 50 s"
    callback = CompileLayers(CompileConfig(backend="eager", time_limit=80), steps_left=10_000)
    train(stack(Slow), callback)
    assert callback.in_effect


@pytest.mark.usefixtures("clock")
def test_a_failed_try_is_reported_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits = fake(monkeypatch, RuntimeError("no such kernel\nat line 1"))
    for _ in range(2):
        callback, module = CompileLayers(AUTO, steps_left=1000), stack(Slow)
        train(module, callback)
        assert callback.reason == "compile off: measuring it failed: RuntimeError: no such kernel"
        assert compiled(module) == [False] * 3
    assert len(limits) == 1
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.exc_info


@pytest.mark.usefixtures("clock")
def test_accumulated_batches_are_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, PAYS)
    callback = CompileLayers(AUTO, steps_left=300)
    train(stack(Slow), callback, accumulate_grad_batches=2, steps=26)
    assert callback.describe()["step_ms"] == 4000
    assert callback.describe()["saved_ms"] == pytest.approx(1500)


@pytest.mark.usefixtures("clock")
def test_a_step_that_fails_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)

    class Broken(Slow):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 11:
                assert any(layer._forward_pre_hooks for layer in self.layers)
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

    module = stack(Broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(module, CompileLayers(AUTO, steps_left=1000))
    assert not any(layer._forward_pre_hooks for layer in module.layers)


def test_layers_that_are_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle(Stack):
        def forward(self, batch: Tensor) -> Tensor:
            return self.heads[0](batch)

    monkeypatch.setattr(policy_module, "MIN_COMPILE_S", 0.0)
    callback = CompileLayers(AUTO, steps_left=10**9)
    train(Idle(), callback)
    assert "ValueError: Block was not called in a training step: give CompileLayers other layers" in callback.reason


def test_what_auto_cannot_do() -> None:
    module = Stack()
    found: list[str] = []
    for policy in ("auto", "always"):
        callback = CompileLayers(CompileConfig(policy=policy, backend="eager"), steps_left=10**9)  # type: ignore[arg-type]
        thread = threading.Thread(target=train, args=(module, callback))
        thread.start()
        thread.join()
        found.append(callback.reason)
    assert found[0].startswith("compile off: the time of a trial compilation can be limited in the main thread only")
    assert found[1] == "compile on: the policy is always"


def test_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "world_size", 2)
    module, callback = Stack(), CompileLayers(AUTO)
    trainer = quiet_trainer()
    callback.on_fit_start(trainer, module)
    assert callback.reason.startswith("compile off: auto measures on one device only")
    CompileLayers(EAGER).on_fit_start(trainer, module)
    assert compiled(module) == [True] * 3


# ------------------------------------------------------------------ the probe


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
    told = callback.describe()
    assert told["reason"] == "off"
    assert told["compile_s"] > 0
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


def test_frozen_layers_are_replayed_forward() -> None:
    layer = Block().requires_grad_(False)
    capture = Capture(layer)
    layer(torch.randn(4, 6))
    capture.close()
    layer(torch.randn(4, 6))
    assert len(capture.calls) == 1
    capture.replay()


def test_a_signature_is_of_structure_alone() -> None:
    one, other = Block(), Block()
    other.dropout.p = 0.1
    assert signature(one) == signature(other.eval())
    other.flag = True
    assert signature(one) != signature(other)
    assert signature(one) != signature(Block().requires_grad_(False))
    assert signature(one) != signature(Block().double())


# ------------------------------------------------------------------ recompilations


class Words(Callback):
    """Gives the layers another word, which a graph depends on, before each so many batches."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for layer in pl_module.layers:
            layer.word = "w" * (batch_idx // self.every)


def test_recompilations_are_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    callback = CompileLayers(EAGER)
    train(stack(), callback, steps=12)
    assert callback.graphs > 0
    assert (callback.recompiles, callback.eager_functions) == (0, 0)
    assert not [record for record in caplog.records if record.name.startswith("lightning_bge")]
    train(stack(), Words(4), callback, steps=12)
    assert callback.recompiles == 5  # two words, with and without a gradient of the input; one in validation
    assert callback.eager_functions == 0
    [message] = [record.getMessage() for record in caplog.records if record.name.startswith("lightning_bge")]
    assert message.startswith("compile: 5 functions were recompiled after the warm-up, 0 could not be compiled")


def test_functions_that_could_not_be_compiled_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    callback = CompileLayers(EAGER)
    with torch._dynamo.config.patch(recompile_limit=3):
        train(stack(), Words(2), callback, steps=20)
    assert callback.eager_functions == 1
    assert any("1 could not be compiled and run eager" in message for message in caplog.messages)


# ------------------------------------------------------------------ one graph for all trials

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
    assert {(c.graphs, c.recompiles, c.eager_functions) for c in later} == {(0, 0, 0)}
    make_eager(find_layers(study.net))
    for one, other in zip(found, loss_and_gradients(study.net), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_one_graph_serves_20_trials() -> None:
    """Another dropout, batch size, cut and learning rate in each; training and validation in turns; results equal."""
    run_trials("bert", "aot_eager", trials=20)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "backend"), [("bert", "inductor"), ("modernbert", "aot_eager")])
def test_one_graph_serves_20_trials_slow(kind: str, backend: str) -> None:
    run_trials(kind, backend, trials=20)


@pytest.mark.slow
def test_auto_decides_on_this_machine() -> None:
    """Whatever it decides, it decides within its limit, and the figures agree with the decision."""
    module = BGEClassifier()
    module.net = TextClassifier(small_model("bert", dropout=0.1))
    batches = [effective_batch(6, seed=k) for k in range(14)]
    callback = CompileLayers(CompileConfig(time_limit=100), steps_left=10**6)
    quiet_trainer(callbacks=[callback]).fit(module, datamodule=Batches(SCHEMA, batches, batches[:1]))
    told = callback.describe()
    assert told["reason"].startswith("compile on: " if told["in_effect"] else "compile off: ")
    assert told["in_effect"] is all(compiled_call(layer) is not None for layer in find_layers(module))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", ["auto", "always"])
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, policy: Any) -> None:
    monkeypatch.setattr(policy_module, "MIN_COMPILE_S", 0.0)
    callback, module = CompileLayers(CompileConfig(policy=policy), steps_left=10**9), stack()
    train(module, callback, accelerator="gpu", devices=1)
    assert callback.in_effect is all(compiled(module))
    assert callback.recompiles == 0
