from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from optuna import TrialPruned
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import profile

from lightning_bge.callbacks import torch_backends as precision_module
from lightning_bge.callbacks.torch_backends import TorchBackends, choose_precision
from lightning_bge.errors import ConfigError
from tests.helpers.small_models import Loader, quiet_trainer

# ------------------------------------------------------------------ choose_precision


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without any accelerator, whose CPU can nothing special."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": False}, raising=False)
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    return monkeypatch


def give_gpu(machine: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    machine.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_gpu_with_bf16_units(machine: pytest.MonkeyPatch) -> None:
    give_gpu(machine, (8, 0))
    for accelerator in ("auto", "gpu", "cuda"):
        assert choose_precision(accelerator) == ("bf16-mixed", "Some GPU multiplies bf16 matrices")


@pytest.mark.parametrize(("capability", "expected"), [((7, 0), "16-mixed"), ((7, 5), "16-mixed"), ((6, 1), "32-true")])
def test_older_gpu(machine: pytest.MonkeyPatch, capability: tuple[int, int], expected: str) -> None:
    give_gpu(machine, capability)
    precision, reason = choose_precision()
    assert precision == expected
    assert "compute capability 8.0" in reason
    assert ("and multiplies fp16 matrices" in reason) == (expected == "16-mixed")


def test_gpu_that_is_not_used(machine: pytest.MonkeyPatch) -> None:
    give_gpu(machine, (9, 0))
    assert choose_precision("cpu") == ("32-true", "this CPU has neither AVX512-BF16 nor AMX")


@pytest.mark.parametrize("unit", ["amx_bf16", "avx512_bf16"])
def test_cpu_with_bf16_units(machine: pytest.MonkeyPatch, unit: str) -> None:
    machine.setattr(torch.cpu, "get_capabilities", lambda: {unit: True})
    precision, reason = choose_precision("cpu")
    assert precision == "bf16-mixed"
    assert unit in reason


def test_plain_cpu(machine: pytest.MonkeyPatch) -> None:
    assert choose_precision()[0] == "32-true"


@pytest.mark.parametrize("able", [{}, {"_is_amx_tile_supported"}, {"_is_avx512_bf16_supported"}], ids=str)
def test_older_torch_is_asked_in_its_own_way(machine: pytest.MonkeyPatch, able: set[str]) -> None:
    machine.delattr(torch.cpu, "get_capabilities")
    for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        machine.setattr(torch.cpu, probe, lambda probe=probe: probe in able, raising=False)
    assert choose_precision("cpu")[0] == ("bf16-mixed" if able else "32-true")


def test_torch_that_cannot_tell_is_taken_for_a_plain_cpu(machine: pytest.MonkeyPatch) -> None:
    for name in ("get_capabilities", "_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        machine.delattr(torch.cpu, name, raising=False)
    assert choose_precision("cpu")[0] == "32-true"


def test_apple(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_precision()[0] == "32-true"
    assert "Apple" in choose_precision("mps")[1]


def test_this_machine_has_an_answer() -> None:
    precision, reason = choose_precision()
    assert precision in ("bf16-mixed", "32-true")
    assert reason
    # the calls that the answer rests on still exist
    assert hasattr(torch.cpu, "get_capabilities") or hasattr(torch.cpu, "_is_avx512_bf16_supported")


# ------------------------------------------------------------------ TorchBackends


def state() -> tuple[Any, ...]:
    cuda = torch.backends.cuda
    kernels = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
    products = cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    return torch.get_float32_matmul_precision(), *products, torch.backends.cudnn.benchmark, *kernels


@pytest.fixture(autouse=True)
def settings_of_this_process() -> Iterator[None]:
    """As torch starts; and as they were, after the test."""
    before = precision_module._get_fp32(), precision_module._get_kernels(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    precision_module._logged.clear()
    yield
    precision_module._put_fp32(before[0])
    precision_module._put_kernels(before[1])
    torch.backends.cudnn.benchmark = before[2]


class Plain(LightningModule):
    def __init__(self, step: Callable[[], Any] = lambda: None, part: nn.Module | None = None) -> None:
        super().__init__()
        self.head, self.step = nn.Linear(3, 1), step
        self.part = nn.Identity() if part is None else part

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.step()
        return self.head(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.step()

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.step()
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


BATCHES = Loader([torch.ones(2, 3)])


def fit(step: Callable[[], Any], *callbacks: Callback) -> Trainer:
    trainer = quiet_trainer(callbacks=list(callbacks), limit_val_batches=0)
    trainer.fit(Plain(step), BATCHES, BATCHES)
    return trainer


def test_what_was_asked_for_is_in_effect_and_put_back() -> None:
    torch.set_float32_matmul_precision("high")
    before, seen = state(), []
    callback = TorchBackends(tf32=False, sdpa=["math"], cudnn_benchmark=False)
    torch.backends.cudnn.benchmark = True
    fit(lambda: seen.append(state()), callback)
    assert seen == [("highest", "ieee", "ieee", False, False, False, False)]
    assert state() == (*before[:3], True, *before[4:])
    assert [(setting.name, setting.value, setting.reason) for setting in callback.report[1:]] == [
        ("fp32 matrix products", "ieee", "full fp32 was requested"),
        ("cuDNN benchmark", "off", "no effect: cuDNN is for CUDA"),
        ("SDPA kernels allowed", "math", "requested"),
    ]
    assert callback.report[0].value == "32-true"


def test_a_setting_that_was_never_touched_is_so_again() -> None:
    fit(lambda: None, TorchBackends(tf32=False))
    assert state()[:3] == ("highest", "none", "none")


def test_by_default_a_cpu_is_left_alone() -> None:
    before, seen = state(), []
    callback = TorchBackends()
    fit(lambda: seen.append(state()), callback)
    assert seen == [before]
    assert "fp32 matrix products: ieee (TF32 is for CUDA, the run is on cpu)" in callback.describe().splitlines()


def test_the_kernel_that_runs_is_the_one_that_was_allowed() -> None:
    query, used = torch.randn(1, 2, 8, 4), []

    def attend() -> None:
        with profile() as trace:
            scaled_dot_product_attention(query, query, query)
        used.append({event.key for event in trace.key_averages()})

    for kernel in ("math", "flash"):
        fit(attend, TorchBackends(sdpa=[kernel]))
    assert "aten::_scaled_dot_product_attention_math" in used[0]
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in used[1]


def raise_it(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (RuntimeError("out of memory"), RuntimeError),
        (TrialPruned(), TrialPruned),
        (KeyboardInterrupt(), SystemExit),
        (SystemExit(3), SystemExit),
    ],
    ids=repr,
)
def test_put_back_after_an_exception(error: BaseException, becomes: type[BaseException]) -> None:
    torch.set_float32_matmul_precision("high")
    before, callback, on_interrupt = state(), TorchBackends(tf32=False, sdpa=["math"]), signal.getsignal(signal.SIGINT)
    with pytest.raises(becomes):
        fit(lambda: raise_it(error), callback)
    signal.signal(signal.SIGINT, on_interrupt)  # Lightning leaves it ignored
    assert state() == before
    fit(lambda: None, callback)
    assert state() == before


def test_put_back_where_another_callback_fails_at_the_start_or_the_end() -> None:
    class Failing(Callback):
        def __init__(self, hook: str) -> None:
            setattr(self, hook, lambda *_, **__: raise_it(RuntimeError("elsewhere")))

    torch.set_float32_matmul_precision("high")
    before, callback = state(), TorchBackends(tf32=False)
    for hook in ("setup", "on_fit_start", "on_train_end", "teardown", "on_exception"):
        for callbacks in ([callback, Failing(hook)], [Failing(hook), callback]):
            if hook == "on_exception" and callbacks[1] is callback:
                continue  # Lightning asks no further callback once one has failed there
            with pytest.raises(RuntimeError, match="elsewhere"):
                fit(lambda: raise_it(RuntimeError("elsewhere")), *callbacks)
            assert state() == before, hook


@pytest.mark.parametrize("same", [True, False])
def test_nested_runs(same: bool) -> None:
    torch.set_float32_matmul_precision("high")
    before, seen = state(), []
    outer = TorchBackends(tf32=False)
    inner = outer if same else TorchBackends(sdpa=["math"])

    def step() -> None:
        fit(lambda: seen.append(state()), inner)
        seen.append(state())
        with pytest.raises(RuntimeError):
            fit(lambda: raise_it(RuntimeError()), inner)
        seen.append(state())

    fit(step, outer)
    assert [found[0] for found in seen] == ["highest"] * 3
    assert seen[1] == seen[2]
    assert state() == before


def test_every_stage_and_the_trainer_again() -> None:
    callback, seen = TorchBackends(sdpa=["math"]), []
    trainer = quiet_trainer(callbacks=[callback])
    module = Plain(lambda: seen.append(state()))
    before = state()
    trainer.fit(module, BATCHES, BATCHES)
    for run in (trainer.validate, trainer.test, trainer.predict):
        callback.report = ()
        run(module, BATCHES)
        assert len(callback.report) == 4
        assert state() == before
    assert len(seen) == 5
    assert {found[4] for found in seen} == {False}


def test_logged_once_a_process(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lightning_bge")
    for _ in range(2):
        fit(lambda: None, TorchBackends())
    fit(lambda: None, TorchBackends(sdpa=["math"]))
    texts = [record.getMessage() for record in caplog.records if record.name == precision_module.__name__]
    assert len(texts) == 2
    [line] = texts[0].splitlines()  # what is CUDA's, or unchanged, is not logged on a CPU
    assert line.startswith("precision: 32-true (")
    assert texts[1].splitlines() == [
        line,
        "fp32 matrix products: ieee (TF32 is for CUDA, the run is on cpu)",
        "cuDNN benchmark: off (no effect: cuDNN is for CUDA)",
        "SDPA kernels allowed: math (requested)",
    ]


@pytest.mark.parametrize("bad", [{"tf32": "high"}, {"sdpa": ["fast"]}, {"sdpa": []}, {"sdpa": "math"}], ids=str)
def test_unknown_values(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"TorchBackends\.{next(iter(bad))} must be"):
        TorchBackends(**bad)


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"tf32": True}, r"tf32 is true, but TF32 is for CUDA, the run is on cpu: set it to auto"),
        ({"cudnn_benchmark": True}, r"cudnn_benchmark: cuDNN is for CUDA, the run is on cpu: leave it out"),
        ({"sdpa": ["cudnn"], "tf32": False}, r"sdpa: a cpu device has flash, math, got cudnn: add one that it has"),
    ],
    ids=str,
)
def test_what_the_device_cannot_do(asked: dict[str, Any], text: str) -> None:
    before = state()
    with pytest.raises(ConfigError, match=text):
        fit(lambda: None, TorchBackends(**asked))
    assert state() == before


# The flags exist in torch's CPU builds too: what a run on a GPU would set can be seen there, without computing.


def gpu_trainer() -> Any:
    strategy = SimpleNamespace(root_device=torch.device("cuda", 0))
    return SimpleNamespace(strategy=strategy, precision="bf16-mixed")


def test_gpu_gets_tf32(machine: pytest.MonkeyPatch) -> None:
    give_gpu(machine, (9, 0))
    callback, trainer, before = TorchBackends(cudnn_benchmark=True), gpu_trainer(), state()
    callback.setup(trainer, Plain(), "fit")
    assert state()[:4] == ("high", "tf32", "tf32", True)
    callback.on_fit_start(trainer, Plain())
    assert callback.describe().splitlines()[:3] == [
        "precision: bf16-mixed (bf16-mixed pays: Some GPU multiplies bf16 matrices)",
        "fp32 matrix products: tf32 (Some GPU has TF32 units)",
        "cuDNN benchmark: on (no effect: the model has no convolution)",
    ]
    callback.teardown(trainer, Plain(), "fit")
    callback.on_exception(trainer, Plain(), RuntimeError())
    assert state() == before


@pytest.mark.parametrize(("given", "reason"), [(None, "unchanged"), (True, "requested")])
def test_model_with_a_convolution(machine: pytest.MonkeyPatch, given: bool | None, reason: str) -> None:
    give_gpu(machine, (9, 0))
    callback, trainer, module = TorchBackends(cudnn_benchmark=given), gpu_trainer(), Plain(part=nn.Conv1d(1, 1, 1))
    callback.setup(trainer, module, "fit")
    callback.on_fit_start(trainer, module)
    callback.teardown(trainer, module, "fit")
    assert callback.report[2].reason == reason


def test_tf32_that_was_on_before_stays(machine: pytest.MonkeyPatch) -> None:
    give_gpu(machine, (9, 0))
    torch.set_float32_matmul_precision("medium")
    callback, trainer = TorchBackends(), gpu_trainer()
    callback.setup(trainer, Plain(), "fit")
    callback.on_fit_start(trainer, Plain())
    assert torch.get_float32_matmul_precision() == "medium"
    assert callback.report[1][1:] == ("tf32", "was set before the run")


def test_settings_made_by_torchs_newer_functions_alone_are_put_back(machine: pytest.MonkeyPatch) -> None:
    """In this state torch.get_float32_matmul_precision() raises."""
    give_gpu(machine, (9, 0))
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    callback, trainer = TorchBackends(tf32=False), gpu_trainer()
    callback.setup(trainer, Plain(), "fit")
    assert torch.get_float32_matmul_precision() == "highest"
    callback.teardown(trainer, Plain(), "fit")
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


@pytest.mark.parametrize("override", [False, True])
def test_gpu_without_tf32(machine: pytest.MonkeyPatch, override: bool) -> None:
    give_gpu(machine, (9, 0) if override else (7, 5))
    if override:
        machine.setenv("NVIDIA_TF32_OVERRIDE", "0")
    callback, trainer, before = TorchBackends(), gpu_trainer(), state()
    callback.setup(trainer, Plain(), "fit")
    assert state() == before
    reason = "NVIDIA_TF32_OVERRIDE=0 turns TF32 off" if override else "Some GPU has no TF32 units"
    with pytest.raises(ConfigError, match=f"tf32 is true, but {reason}"):
        TorchBackends(tf32=True).setup(trainer, Plain(), "fit")


def test_old_gpu_has_no_flash_kernel(machine: pytest.MonkeyPatch) -> None:
    give_gpu(machine, (7, 5))
    with pytest.raises(ConfigError, match="sdpa: Some GPU has math, mem_efficient, got flash, cudnn"):
        TorchBackends(sdpa=["flash", "cudnn"]).setup(gpu_trainer(), Plain(), "fit")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 is for CUDA")
def test_tf32_is_really_used() -> None:
    left, right = torch.randn(2, 512, 512, dtype=torch.float64, device="cuda")
    errors: list[float] = []

    def step() -> None:
        product = (left.float() @ right.float()).double()
        errors.append((product - left @ right).abs().max().item())

    for tf32 in (True, False):
        callback = TorchBackends(tf32=tf32)
        trainer = quiet_trainer(callbacks=[callback], limit_val_batches=0, accelerator="gpu", devices=1)
        trainer.fit(Plain(step), BATCHES, BATCHES)
    assert errors[0] > 20 * errors[1]
    assert torch.get_float32_matmul_precision() == "highest"
