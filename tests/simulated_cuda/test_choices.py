"""What is chosen by the device's compute capability: precision, TF32, kernels of attention, where memory ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_bge.advisor.audit.ablation import count_devices
from lightning_bge.callbacks import TorchBackends
from lightning_bge.callbacks.compile.probe import missing_tool
from lightning_bge.callbacks.torch_backends import choose_precision
from lightning_bge.cli.commands.worker import _memory
from lightning_bge.errors import ConfigError
from lightning_bge.models.attention.cuda import capabilities
from lightning_bge.models.attention.packed import Kind, choose_backend
from lightning_bge.runtime.distributed import _count
from lightning_bge.runtime.memory import limits
from lightning_bge.runtime.random_state import random_state, set_random_state
from tests.helpers.small_models import quiet_trainer
from tests.simulated_cuda.device import CUDA, SimulatedDevice

pytestmark = pytest.mark.filterwarnings("ignore:GPU available but not used")
GPU: dict[str, Any] = {"accelerator": "gpu", "devices": 1}


@pytest.mark.parametrize(
    ("capability", "changes", "name"),
    [
        ((9, 0), {}, "flash"),
        ((8, 0), {"windowed": True}, "flash"),
        ((9, 0), {"head_dim": 256}, "nested"),
        ((9, 0), {"head_dim": 12}, "sdpa"),
        ((9, 0), {"dtype": torch.float64}, "sdpa"),
        ((9, 0), {"dtype": torch.float32}, "nested"),
        ((9, 0), {"dtype": torch.float32, "windowed": True}, "sdpa"),
        ((7, 5), {"dtype": torch.float16}, "nested"),
        ((7, 5), {}, "sdpa"),
    ],
)
def test_attention(device: SimulatedDevice, capability: tuple[int, int], changes: dict[str, Any], name: str) -> None:
    device.capability = capability
    kind = replace(Kind(CUDA, torch.bfloat16, dropout=True, windowed=False, head_dim=64), **changes)
    assert choose_backend(kind, capabilities(CUDA)).name == name


def test_attention_without_the_flash_operators_or_nested_tensors(device: SimulatedDevice) -> None:
    able = replace(capabilities(CUDA), flash=False)
    kind = Kind(CUDA, torch.bfloat16, dropout=False, windowed=False, head_dim=64)
    assert choose_backend(kind, able).name == "varlen"
    assert choose_backend(replace(kind, dropout=True), able).name == "nested"
    assert choose_backend(kind, replace(able, varlen=False, nested=False)).name == "sdpa"


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((9, 0), "bf16-mixed"), ((8, 0), "bf16-mixed"), ((7, 5), "16-mixed"), ((7, 0), "16-mixed"), ((6, 1), "32-true")],
)
def test_precision(device: SimulatedDevice, capability: tuple[int, int], precision: str) -> None:
    device.capability = capability
    assert choose_precision()[0] == precision


def backends(**options: Any) -> tuple[TorchBackends, dict[str, str], str]:
    """The callback after a training, what it has reported, and TF32 in the training's steps."""
    seen: list[str] = []

    class Module(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv1d(1, 1, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(torch.backends.cuda.matmul.fp32_precision)
            return super().training_step(batch, batch_idx)

    callback = TorchBackends(**options)
    quiet_trainer(callbacks=[callback], max_steps=1, limit_val_batches=0, **GPU).fit(Module())
    return callback, {setting.name: setting.value for setting in callback.report}, seen[0]


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), "tf32"), ((7, 5), "ieee")])
def test_tf32_is_on_where_the_device_has_it_and_put_back(
    device: SimulatedDevice, capability: tuple[int, int], expected: str
) -> None:
    device.capability = capability
    before = torch.backends.cuda.matmul.fp32_precision
    _, report, inside = backends()
    assert (report["fp32 matrix products"], inside.replace("none", "ieee")) == (expected, expected)
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert report["cuDNN benchmark"] == "off"


def test_back_ends_that_are_asked_for(device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    _, report, inside = backends(tf32=False, cudnn_benchmark=True, sdpa=["flash", "math"])
    assert (report["cuDNN benchmark"], report["SDPA kernels allowed"], inside) == ("on", "flash, math", "ieee")
    assert not torch.backends.cudnn.benchmark
    device.capability = (7, 5)
    with pytest.raises(ConfigError, match="has math, mem_efficient, got flash"):
        backends(sdpa=["flash"])
    with pytest.raises(ConfigError, match="has no TF32 units"):
        backends(tf32=True)
    device.capability = (9, 0)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with pytest.raises(ConfigError, match="NVIDIA_TF32_OVERRIDE=0 turns TF32 off"):
        backends(tf32=True)


@pytest.mark.usefixtures("device")
def test_a_gpu_of_rocm_is_none_of_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    precision, reason = choose_precision()
    assert (precision, reason) == ("32-true", "on AMD's GPUs 16-bit autocast is not measured yet")
    assert capabilities(CUDA).compute == (0, 0)
    kind = Kind(CUDA, torch.bfloat16, dropout=True, windowed=False, head_dim=64)
    assert choose_backend(kind, capabilities(CUDA)).name == "sdpa"
    _, report, inside = backends(sdpa=["flash", "math"])
    assert report["fp32 matrix products"] == inside.replace("none", "ieee") == "ieee"
    with pytest.raises(ConfigError, match="has no TF32 units"):
        backends(tf32=True)


def test_what_compiling_lacks(device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lightning_bge.callbacks.compile import probe

    monkeypatch.setattr(probe, "has_triton", lambda: True)
    assert missing_tool(CUDA, "inductor") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "")
    assert missing_tool(CUDA, "inductor") == "there is no C compiler, which triton needs: install gcc"
    monkeypatch.setattr(probe, "has_triton", lambda: False)
    assert "there is no triton" in str(missing_tool(CUDA, "inductor"))


def test_shares_and_counts_of_devices(device: SimulatedDevice) -> None:
    assert _memory(1) == []
    assert _memory(4) == ["--memory.limit_gb", f"{device.total / 4 / 2**30:.3f}"]
    assert count_devices({"accelerator": "gpu"}) == count_devices({"devices": -1}) == 1
    assert _count("auto", "gpu") == _count(-1, "cuda") == 1


def test_limits_are_those_of_the_device(device: SimulatedDevice) -> None:
    device.total = 2**30
    torch.zeros(2**18, device="cuda")
    held = torch.zeros(2**18, device="cuda")
    [limit] = limits()
    assert limit.total == 2**30
    assert limit.free == limits(CUDA)[0].free == 2**30 - device.allocated
    assert device.allocated >= held.nbytes
    assert limits(CUDA, 2**22)[0].free == 2**22 - device.allocated


def test_random_numbers_of_the_device_are_kept_in_a_checkpoint(device: SimulatedDevice, tmp_path: Path) -> None:
    torch.save(random_state(), tmp_path / "state.pt")
    drawn = torch.rand(5, device="cuda").cpu()
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(torch.rand(5, device="cuda").cpu(), drawn)
