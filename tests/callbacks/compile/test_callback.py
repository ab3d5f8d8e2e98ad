"""The options, the layers, and the policies never, always and auto."""

from __future__ import annotations

import logging
import math
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from lightning.pytorch import Trainer
from safetensors.torch import save_model
from torch import Tensor, nn

from lightning_bge.callbacks.compile import callback as compile_module
from lightning_bge.callbacks.compile import policy as policy_module
from lightning_bge.callbacks.compile import probe as probe_module
from lightning_bge.callbacks.compile.callback import CompileLayers
from lightning_bge.callbacks.compile.layers import find_layers
from lightning_bge.callbacks.compile.policy import (
    CompileConfig,
)
from lightning_bge.callbacks.compile.probe import (
    Measured,
    TimeLimitExceeded,
    missing_tool,
)
from lightning_bge.errors import ConfigError
from tests.helpers.small_models import quiet_trainer, small_model
from tests.helpers.stacks import EAGER, Slow, Stack, compiled, fake, stack, train

pytestmark = [
    pytest.mark.usefixtures("forgetful"),
    # dynamo asks every tensor for its gradient and hides the warning of that in a way that an error filter goes around
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # inductor of torch 2.13 imports what torch 2.13 deprecates
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


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


def test_never_touches_nothing() -> None:
    callback, module = CompileLayers(CompileConfig(policy="never")), Stack()
    train(module, callback)
    assert compiled(module) == [False] * 3
    assert callback.reason == "compile off: the policy is never"
    assert (callback.in_effect, callback.graphs, callback.found.measured) == (False, 0, None)


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


def test_compiled_training_equals_eager_training() -> None:
    module, plain = stack(), stack()
    for net in (module, plain):
        for layer in net.layers:
            layer.dropout.p = 0.0
    train(module, CompileLayers(EAGER), max_epochs=2)
    train(plain, max_epochs=2)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], msg=name)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_layers_are_compiled_for_all_sizes_at_once(monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append(options))
    train(Stack(), CompileLayers(CompileConfig(policy="always", mode=mode, backend="eager")))
    assert asked == [{"dynamic": True, "mode": mode, "backend": "eager"}] * 3


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
    assert callback.in_effect
    found = callback.found
    assert (found.layers, found.step_s, found.measured, found.saved_s) == (3, 2, PAYS, pytest.approx(0.75))


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
def test_out_of_time_is_reported_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = fake(monkeypatch, TimeLimitExceeded())
    config = CompileConfig(backend="eager", time_limit=50)
    for steps in (112, 10_000):
        callback, module = CompileLayers(config, steps_left=steps), stack(Slow)
        train(module, callback)
        assert callback.reason == "compile off: one layer was not compiled within 33.3 s"
        assert compiled(module) == [False] * 3
    assert limits == [pytest.approx(100 / 3)]


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
    assert (callback.found.step_s, callback.found.saved_s) == (4, pytest.approx(1.5))


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
