"""Planted defects of torch.compile, optimizer, attention and dropout: requested, but not in effect."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from tests.helpers.audit_run import expect_alarm
from tests.helpers.foreign_modules import Classifier

# ---------------------------------------------------------------------- torch.compile


class Ignoring(Classifier):
    """Its option is read and passed on, and then ignored."""

    def configure_model(self) -> None:
        if self.hparams.use_torch_compile:
            torch.compile(self.net, backend="eager")


class Plain(nn.Module):
    """A layer that torch.compile can compile."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(32, 32)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return torch.relu(self.weight(x)) * factor


class OverPlain(L.LightningModule):
    """A stack of `Plain`, all of its matrix products in them; shapes or numbers that change at each step, if asked."""

    def __init__(self, compiling: str = "each", shapes: bool = False, numbers: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Plain() for _ in range(2)])
        self.shapes, self.numbers, self.calls = shapes, numbers, 0
        if compiling == "sequential":
            self.stack = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
            self.layers = nn.ModuleList()
            self.stack.compile(backend="eager")
        else:
            for layer in self.layers:
                layer.compile(backend="eager", dynamic=False if shapes else None)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.calls += 1
        x = batch[:, : 3 + self.calls] if self.shapes else batch
        if not len(self.layers):
            return self.stack(x).sum()
        for layer in self.layers:
            x = layer(x, 1.0 + 0.1 * self.calls) if self.numbers else layer(x)
        return x.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), fused=True)


def numbers_loader() -> Any:
    return torch.utils.data.DataLoader(torch.randn(96, 40, 32), batch_size=8)


def test_compile_is_requested_and_ignored() -> None:
    assert "nothing was given" in expect_alarm(Ignoring(use_torch_compile=True), "torch.compile")


@pytest.mark.skipif(torch.__version__ >= "2.14", reason="torch compiles such modules since 2.14")
def test_compile_is_requested_for_a_module_that_torch_skips() -> None:
    assert "skips" in expect_alarm(OverPlain("sequential"), "torch.compile", numbers_loader())


def test_compile_recompiles_every_step_for_new_shapes() -> None:
    with torch._dynamo.config.patch(recompile_limit=64):
        assert "recompiled" in expect_alarm(OverPlain(shapes=True), "torch.compile", numbers_loader())


def test_compile_recompiles_every_step_for_new_numbers() -> None:
    with torch._dynamo.config.patch(recompile_limit=64, specialize_float=True):
        assert "recompiled" in expect_alarm(OverPlain(numbers=True), "torch.compile", numbers_loader())


def test_compile_silently_eager_after_the_limit_within_the_run() -> None:
    with torch._dynamo.config.patch(recompile_limit=2):
        assert "given up" in expect_alarm(OverPlain(shapes=True), "torch.compile", numbers_loader())


def test_compile_silently_eager_as_an_evaluation_reached_the_limit() -> None:
    module = OverPlain()
    with torch._dynamo.config.patch(recompile_limit=1):
        for layer in module.layers:  # an evaluation came first
            with torch.no_grad():
                layer(torch.randn(2, 5, 32))
        assert "given up" in expect_alarm(module, "torch.compile", numbers_loader())


# ---------------------------------------------------------------------- optimizer, attention, dropout


def test_fused_is_requested_but_foreach_runs() -> None:
    assert "foreach" in expect_alarm(Classifier(fused=False, fused_adamw=True), "fused optimizer")


class Restored(Classifier):
    """Its optimizer takes over the state, and with it the flags, of an older run."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        state = torch.optim.AdamW(self.parameters(), foreach=True).state_dict()
        optimizer.load_state_dict(state)
        return optimizer


def test_fused_lost_with_a_restored_state() -> None:
    assert "foreach" in expect_alarm(Restored(), "fused optimizer")


def test_eager_attention_of_transformers() -> None:
    assert "eager" in expect_alarm(Classifier(attention="eager"), "attention kernel")


class ByHand(Classifier):
    """Its model is set to SDPA, but a layer on top computes attention scores as a tensor."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.net.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        heads = hidden.unflatten(-1, (2, 16)).transpose(1, 2)
        mixed = (heads @ heads.transpose(2, 3)).softmax(-1) @ heads
        logits = self.net.classifier(mixed.transpose(1, 2).flatten(2)[:, 0])
        return nn.functional.cross_entropy(logits, batch["labels"])


def test_eager_attention_by_hand() -> None:
    assert "eager" in expect_alarm(ByHand(), "attention kernel")


def test_dropout_silently_off_after_from_pretrained() -> None:
    module = Classifier()
    module.net.eval()
    assert "in eval mode" in expect_alarm(module, "dropout")


class StaysInEvalMode(Classifier):
    """Calls `eval` for its metrics and never `train` afterwards."""

    def on_train_start(self) -> None:
        self.net.bert.eval()


def test_dropout_silently_off_in_the_encoder_alone() -> None:
    assert "in eval mode" in expect_alarm(StaysInEvalMode(), "dropout")
