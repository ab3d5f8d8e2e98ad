"""Sound training runs, in which an audit finds nothing to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from lightning_bge.advisor.audit.audit import audit
from lightning_bge.advisor.audit.requested import Requested
from lightning_bge.data.batches.config import BatchingConfig
from lightning_bge.models.classifier import BGEClassifier
from tests.helpers.audit_run import CPU, OBSERVE
from tests.helpers.foreign_modules import Accumulating, Classifier, loader
from tests.helpers.small_search import small_data, write_files


def compiled_classifier() -> Classifier:
    module = Classifier()
    for layer in module.net.bert.encoder.layer:
        layer.compile(backend="eager", dynamic=True)
    return module


class Regression(L.LightningModule):
    """No transformer, no mask, no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def regression_loader() -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(96, 8), torch.randn(96, 1)), 8)


MODULES: dict[str, Any] = {
    "plain": (Classifier, loader, {}, None),
    "accumulation of two batches": (Classifier, loader, {"accumulate_grad_batches": 2}, Requested(effective_batch=16)),
    "manual, steps of three batches": (
        lambda: Accumulating(3),
        lambda: loader(8, rows=80),
        {},
        Requested(effective_batch=24),
    ),
    # a step takes longer than a worker needs for a batch, however busy the machine is
    "persistent workers": (
        lambda: Classifier(width=768),
        lambda: loader(num_workers=1, persistent_workers=True),
        {},
        None,
    ),
    "no dropout": (lambda: Classifier(dropout=0.0), loader, {}, None),
    "compiled layers": (compiled_classifier, loader, {}, Requested(compile=True)),
    "bf16": (Classifier, loader, {"precision": "bf16-mixed", "gradient_clip_val": None}, None),
    "a plain network": (Regression, regression_loader, {}, None),
}


@pytest.mark.parametrize("name", MODULES)
def test_no_alarm_for_any_module(name: str) -> None:
    make_module, make_loader, trainer, requested = MODULES[name]
    found = audit(make_module(), make_loader(), {**CPU, **trainer}, requested, OBSERVE)
    assert not found.alarms


OWN_MODELS: dict[str, Any] = {
    "packed": ({}, {}, {}),
    "padded": ({"attention": "padded"}, {}, {}),
    "small micro-batches, bf16": ({}, {"max_tokens": 48}, {"precision": "bf16-mixed"}),
    "frozen layers": ({"frozen_layers": 1}, {}, {}),
}


@pytest.mark.parametrize("name", OWN_MODELS)
def test_no_alarm_for_models_of_this_package(name: str, tmp_path: Path) -> None:
    options, batching, trainer = OWN_MODELS[name]
    folder = write_files(tmp_path)
    rows = (folder / "train.csv").read_text().splitlines()
    (folder / "train.csv").write_text("\n".join([*rows, *rows[1:], *rows[1:]]) + "\n")
    data = small_data(folder, batching=BatchingConfig(**batching))
    model = BGEClassifier(str(folder / "model"), **options)
    found = audit(model, data, {**CPU, **trainer}, Requested(effective_batch=8), OBSERVE)
    assert not found.alarms
    assert found.row("effective batch").requested == "8 rows"
