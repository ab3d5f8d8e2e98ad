from __future__ import annotations

import pytest
import torch

from lightning_bge.callbacks import choose_precision


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without any accelerator, whose CPU can nothing special."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": False})
    return monkeypatch


def give_gpu(machine: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    machine.setattr(torch.cuda, "get_device_capability", lambda: capability)


def test_gpu_with_bf16_units(machine: pytest.MonkeyPatch) -> None:
    give_gpu(machine, (8, 0))
    for accelerator in ("auto", "gpu", "cuda"):
        assert choose_precision(accelerator) == ("bf16-mixed", "Some GPU multiplies bf16 matrices")


def test_older_gpu(machine: pytest.MonkeyPatch) -> None:
    give_gpu(machine, (7, 5))
    precision, reason = choose_precision()
    assert precision == "32-true"
    assert "compute capability 8.0" in reason


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


def test_apple(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_precision()[0] == "32-true"
    assert "Apple" in choose_precision("mps")[1]


def test_this_machine_has_an_answer() -> None:
    precision, reason = choose_precision()
    assert precision in ("bf16-mixed", "32-true")
    assert reason
    assert {"architecture"} <= torch.cpu.get_capabilities().keys()  # the call that the answer rests on still exists
