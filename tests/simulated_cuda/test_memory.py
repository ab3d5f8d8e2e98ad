"""Where the memory of the device ends: the micro-batch finder, and an error at each place of a training."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from optuna.distributions import FloatDistribution
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bge import tune
from lightning_bge.callbacks import MemoryConfig, MicroBatchFinder
from tests.helpers.small_models import quiet_trainer
from tests.simulated_cuda.device import SimulatedDevice

pytestmark = pytest.mark.filterwarnings("ignore:GPU available but not used", "ignore:.*num_workers")
GPU: dict[str, Any] = {"accelerator": "gpu", "devices": 1}
PLACES = ("constructor", "forward", "backward", "optimizer", "validation")


class Wide(LightningModule):
    """A layer whose activations need far more memory than its weights; fails at a place, if one is named."""

    def __init__(self, batch_size: int = 64, lr: float = 0.01, fails: str = "") -> None:
        super().__init__()
        self.batch_size, self.lr, self.fails = batch_size, lr, fails
        self.net = nn.Sequential(nn.Linear(4, 4096), nn.ReLU(), nn.Linear(4096, 1))
        if fails == "constructor":
            exhaust()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        if self.fails == "forward":
            exhaust()
        if self.fails == "backward":
            loss.register_hook(lambda grad: exhaust())
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.fails == "optimizer":
            exhaust()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.fails == "validation":
            exhaust()
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def train_dataloader(self) -> DataLoader[Any]:
        rows = torch.randn(128, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(rows, rows.sum(1, keepdim=True)), batch_size=self.batch_size)

    val_dataloader = train_dataloader


def exhaust() -> None:
    """Ask for more than the device has."""
    torch.zeros(2**40, device="cuda")


def weights(module: LightningModule) -> list[Tensor]:
    return [parameter.detach().cpu() for parameter in module.parameters()]


@pytest.mark.parametrize("mib", [1, 2, 64])
def test_the_finder_finds_what_fits_and_trains_the_same(device: SimulatedDevice, mib: int) -> None:
    def train(**options: Any) -> tuple[LightningModule, Any]:
        seed_everything(0, verbose=False)
        module = Wide()
        trainer = quiet_trainer(max_epochs=2, limit_val_batches=0, **options)
        trainer.fit(module)
        return module, trainer

    expected, _ = train(accelerator="cpu")
    device.total = device.allocated + mib * 2**20
    finder = MicroBatchFinder(MemoryConfig(cache=False))
    found, trainer = train(callbacks=[finder], **GPU)
    size = finder.micro_batch_size
    assert size is not None
    assert 64 % size == 0
    assert (size < 64) == (mib < 64)
    assert trainer.global_step == 4
    for one, other in zip(weights(found), weights(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_an_error_anywhere_is_a_pruned_trial(device: SimulatedDevice, tmp_path: Any, place: str) -> None:
    device.total = device.allocated + 2**28

    def study(failing: str) -> Any:
        def build(params: dict[str, Any]) -> tuple[LightningModule, None]:
            return Wide(lr=params["lr"] * 1e-3, fails=failing if 0.3 < params["lr"] < 0.8 else ""), None

        options: dict[str, Any] = {"n_trials": 8, "max_epochs": 2, "trainer": GPU}
        monitor = {"metric": "val_loss", "mode": "min"}
        space = {"lr": FloatDistribution(0.01, 1.0)}
        return tune(
            build,
            space,
            run_dir=tmp_path / (failing or "none"),
            monitor=monitor,
            sampler={"name": "random"},
            pruner={"name": "none"},
            **options,
        )

    before, held = torch.backends.cuda.matmul.fp32_precision, device.allocated
    plain, failing = study(""), study(place)
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert device.allocated - held < 2**20
    values = {trial.number: trial.value for trial in plain.study.trials}
    states = [trial.state for trial in failing.study.trials]
    assert states.count(optuna.trial.TrialState.PRUNED) == sum(
        0.3 < trial.params["lr"] < 0.8 for trial in failing.study.trials
    )
    assert 0 < states.count(optuna.trial.TrialState.PRUNED) < 8
    for trial in failing.study.trials:
        if trial.state == optuna.trial.TrialState.COMPLETE:
            assert trial.value == values[trial.number]
