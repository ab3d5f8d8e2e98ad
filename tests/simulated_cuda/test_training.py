"""Training and validation on a CUDA device: the values of a CPU, and no step that waits for the device."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor

from lightning_bge.models.attention import packed as attention
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder import TextClassifier
from lightning_bge.models.optimizer import OptimizerConfig
from lightning_bge.types import Batch, Schema
from tests.helpers.small_models import Batches, cut_batch, quiet_trainer, random_sequences, small_model
from tests.simulated_cuda.device import SimulatedDevice

SCHEMA = Schema("binary", ("no", "yes"), ("text",), 64)
pytestmark = pytest.mark.filterwarnings("ignore:GPU available but not used")
GPU: dict[str, Any] = {"accelerator": "gpu", "devices": 1}


def batches(count: int = 6) -> list[Batch]:
    lengths = [[3 + (5 * row + 7 * number) % 17 for row in range(6)] for number in range(count)]
    labels = (torch.arange(6) % 2).float()
    return [cut_batch(random_sequences(each, seed=number), labels, 2) for number, each in enumerate(lengths)]


class Losses(Callback):
    """The loss of each step."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.found.append(pl_module._losses[-1])


def train(
    kind: str, dropout: float = 0.0, lr: float = 1e-3, epochs: int = 2, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """The loss of each step, and the weights at the end."""
    seed_everything(1, verbose=False)
    attention._in_use.clear()
    module, losses = BGEClassifier(optimizer=OptimizerConfig(lr=lr)), Losses()
    module.net = TextClassifier(small_model(kind, dropout=dropout))
    trainer = quiet_trainer(callbacks=[losses], max_epochs=epochs, log_every_n_steps=0, **options)
    trainer.fit(module, datamodule=Batches(SCHEMA, batches(), batches(2)))
    # AdamW divides the gradient of a key's bias, which is 0 but for rounding, by its size
    named = [(name, one) for name, one in module.net.named_parameters() if not re.search("(key|k_lin).bias", name)]
    weights = [one.detach().cpu() for _, one in named]
    return torch.stack(losses.found).cpu(), [*weights, trainer.callback_metrics["val_loss"].cpu()]


def backends() -> set[str]:
    return {backend.name for _, backend in attention.backends_in_use()}


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "modernbert", "distilbert"])
def test_fp32_equals_the_cpu(device: SimulatedDevice, kind: str, capability: tuple[int, int]) -> None:
    device.capability = capability
    found, weights = train(kind, precision="32-true", **GPU)
    used = backends()
    expected, others = train(kind, precision="32-true")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(weights, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert used == {"modernbert": {"nested", "sdpa"}, "distilbert": set()}.get(kind, {"nested"})


@pytest.mark.parametrize(
    ("capability", "precision", "names"),
    [
        ((7, 5), "16-mixed", {"nested"}),
        ((8, 0), "bf16-mixed", {"flash"}),
        ((8, 0), "16-mixed", {"flash"}),
        ((9, 0), "bf16-mixed", {"flash"}),
    ],
)
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_16_bit_follows_fp32(
    device: SimulatedDevice, kind: str, capability: tuple[int, int], precision: str, names: set[str]
) -> None:
    device.capability = capability
    found, _ = train(kind, precision=precision, **GPU)
    assert backends() == names
    expected, _ = train(kind, precision="32-true")
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_no_step_waits_for_the_device(device: SimulatedDevice, kind: str, precision: str) -> None:
    waits: list[str] = []

    class Watch(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            device.waits.clear()

        def on_train_batch_end(self, *_: Any) -> None:
            waits.extend(device.waits)

    seed_everything(1, verbose=False)
    module = BGEClassifier()
    module.net = TextClassifier(small_model(kind, dropout=0.1))
    trainer = quiet_trainer(callbacks=[Watch()], precision=precision, log_every_n_steps=0, limit_val_batches=0, **GPU)
    trainer.fit(module, datamodule=Batches(SCHEMA, batches(20)))
    assert trainer.global_step == 20
    assert waits == []
