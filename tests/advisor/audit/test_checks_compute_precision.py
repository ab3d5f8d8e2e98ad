"""Planted defects of precision: requested, but not in effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler

from lightning_bge.advisor.audit.audit import audit
from lightning_bge.advisor.audit.requested import Requested
from tests.helpers.audit_run import OBSERVE, expect_alarm
from tests.helpers.foreign_modules import Classifier, loader


class Island(Classifier):
    """Its encoder runs in a region where autocast is off."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().loss(batch)


class OwnProduct(torch.autograd.Function):
    """A custom function, whose inputs autocast does not touch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x.float() @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w.T, x.float().flatten(0, -2).T @ grad.flatten(0, -2)


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return OwnProduct.apply(x, self.weight.T) + self.bias


def test_bf16_is_requested_but_a_region_without_autocast_multiplies() -> None:
    assert "fp32" in expect_alarm(Island(), "bf16 matrix products", precision="bf16-mixed")


def test_bf16_is_requested_but_custom_layers_multiply_in_fp32() -> None:
    module = Classifier()
    for layer in module.net.bert.encoder.layer:
        for owner, name in ((layer.intermediate, "dense"), (layer.output, "dense")):
            getattr(owner, name).__class__ = OwnLinear
    assert "fp32" in expect_alarm(module, "bf16 matrix products", precision="bf16-mixed")


def fp16() -> dict[str, Any]:
    """Lightning makes no such plugin on a CPU."""
    return {"plugins": MixedPrecision("16-mixed", "cpu", scaler=GradScaler("cpu"))}


def test_fp16_is_requested_and_in_effect_or_not() -> None:
    found = audit(Classifier(), loader(), {"accelerator": "cpu", **fp16()}, None, OBSERVE).row("fp16 matrix products")
    assert (found.requested, found.verdict) == ("on", "ok")
    assert "fp32" in expect_alarm(Island(), "fp16 matrix products", **fp16())


@pytest.mark.gpu
def test_tf32_off_by_swapped_arguments() -> None:
    def set_up(cudnn_benchmark: bool, tf32: bool) -> None:
        torch.backends.cudnn.benchmark = cudnn_benchmark
        torch.set_float32_matmul_precision("high" if tf32 else "highest")

    set_up(True, False)  # the arguments are swapped
    found = audit(Classifier(tf32=True), loader(), {"accelerator": "cuda"}, config=OBSERVE)
    assert "TF32" in {row.name for row in found.alarms}


@pytest.mark.gpu
def test_tf32_off_as_no_code_sets_it() -> None:
    torch.set_float32_matmul_precision("highest")
    found = audit(Classifier(), loader(), {"accelerator": "cuda"}, Requested(tf32=True), OBSERVE)
    assert "TF32" in {row.name for row in found.alarms}
