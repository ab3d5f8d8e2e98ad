"""Memory runs out at each place of a trial of somebody else's module, in the two packages that have a Trainer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState
from torch.utils.data import DataLoader, TensorDataset

from lightning_bge.hpo import OOMPruningCallback, prune_out_of_memory

PLACES = ("constructor", "forward", "backward", "optimizer", "validation", "checkpoint")
TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15 GiB of which 1.00 GiB is free."
OFF = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:`isinstance.treespec, LeafSpec:FutureWarning",  # Lightning 2.6 under torch 2.13
    "ignore:.*was configured so checkpointing is enabled, but:UserWarning",
)


class Fault:
    """Runs out of memory at one place of one trial."""

    def __init__(self, place: str, error: Callable[[], Exception] = lambda: torch.OutOfMemoryError(TEXT)) -> None:
        self.place, self.error = place, error

    def at(self, place: str, trial: int) -> None:
        if (place, trial) == (self.place, 1):
            held = torch.ones(4 * 2**20)  # 16 MiB in a frame of the traceback
            assert held.sum() > 0
            raise self.error()


class Loss(torch.autograd.Function):
    """The identity, whose gradient runs out of memory."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, fault: Fault, trial: int) -> torch.Tensor:
        ctx.fault, ctx.trial = fault, trial
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.fault.at("backward", ctx.trial)
        return gradients[0], None, None


def module_of(package: Any, fault: Fault, trial: int) -> Any:
    """A module of a package, which knows nothing of searches."""

    class Net(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)
            for values in self.parameters():
                torch.nn.init.constant_(values, 0.1 * (trial + 1))
            fault.at("constructor", trial)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            fault.at("forward", trial)
            return Loss.apply(self.layer(batch[0]).square().mean(), fault, trial)

        def validation_step(self, batch: Any, index: int) -> None:
            fault.at("validation", trial)
            self.log("val_loss", self.layer(batch[0]).square().mean())

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            fault.at("checkpoint", trial)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            class Steps(torch.optim.SGD):
                def step(self, closure: Any = None) -> Any:
                    fault.at("optimizer", trial)
                    return super().step(closure)

            return Steps(self.parameters(), lr=0.01)

    return Net()


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(32.0).reshape(8, 4) / 32), batch_size=4)


def search(package: Any, fault: Fault, folder: Any, *, callback: bool, wrapper: bool) -> optuna.Study:
    """Three trials of somebody's objective."""

    def train(trial: optuna.Trial) -> float:
        callbacks = [OOMPruningCallback(trial)] if callback else []
        place = folder / str(trial.number)
        trainer = package.Trainer(
            **OFF, max_epochs=1, accelerator="cpu", logger=False, default_root_dir=place, callbacks=callbacks
        )
        trainer.fit(module_of(package, fault, trial.number), data(), data())
        return float(trainer.callback_metrics["val_loss"])

    def objective(trial: optuna.Trial) -> float:
        if not wrapper:
            return train(trial)
        with prune_out_of_memory(trial):
            return train(trial)

    study = optuna.create_study()
    study.optimize(objective, n_trials=3)
    return study


CASES = [*(("lightning.pytorch", place) for place in PLACES), ("pytorch_lightning", "forward")]


@pytest.mark.parametrize(("name", "place"), CASES)
def test_the_trial_is_pruned_and_the_others_have_the_same_values(name: str, place: str, tmp_path: Any) -> None:
    package = pytest.importorskip(name)
    undisturbed = search(package, Fault("nowhere"), tmp_path / "a", callback=False, wrapper=False)
    for callback in (False, True):
        study = search(package, Fault(place), tmp_path / f"b{callback}", callback=callback, wrapper=True)
        assert [one.state for one in study.trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE]
        assert [study.trials[n].value for n in (0, 2)] == [undisturbed.trials[n].value for n in (0, 2)]
        known = study.trials[1].user_attrs
        assert (known["oom_kind"], known["oom_requested"], known["oom_free"]) == ("device", 2 * 2**30, 2**30)
        assert known["oom_text"] == TEXT
        assert "memory_kept" not in known
        if callback and place not in ("constructor", "checkpoint"):
            assert known["oom_where"] == place


@pytest.mark.parametrize("place", [place for place in PLACES if place != "constructor"])
def test_the_callback_alone_prunes_what_fails_in_fit(place: str, tmp_path: Any) -> None:
    package = importlib.import_module("lightning.pytorch")
    study = search(package, Fault(place), tmp_path, callback=True, wrapper=False)
    assert [one.state for one in study.trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE]


def test_other_errors_are_left_alone(tmp_path: Any) -> None:
    package = importlib.import_module("lightning.pytorch")
    fault = Fault("forward", lambda: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        search(package, fault, tmp_path, callback=True, wrapper=True)


def test_memory_that_is_held_is_said() -> None:
    held = []

    def objective(trial: optuna.Trial) -> float:
        with prune_out_of_memory(trial):
            held.append(torch.ones(2**20))
            raise torch.OutOfMemoryError(TEXT)

    study = optuna.create_study()
    study.optimize(objective, n_trials=1)
    assert study.trials[0].state == TrialState.PRUNED
    assert study.trials[0].user_attrs["memory_kept"] == pytest.approx(4 * 2**20, rel=0.01)


def test_all_that_follows_an_error_in_the_trainer_happens_still(tmp_path: Any) -> None:
    from lightning.pytorch import Callback, LightningDataModule, Trainer
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.strategies import SingleDeviceStrategy

    seen = []

    class Later(Callback):
        def on_exception(self, *args: Any) -> None:
            seen.append("callback")

    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return data()

        val_dataloader = train_dataloader

        def on_exception(self, exception: BaseException) -> None:
            seen.append("data")

    class Strategy(SingleDeviceStrategy):
        def on_exception(self, exception: BaseException) -> None:
            seen.append("strategy")

        def teardown(self) -> None:
            seen.append("teardown")
            super().teardown()

    class Logger(CSVLogger):
        def finalize(self, status: str) -> None:
            seen.append(status)

    trial = optuna.create_study().ask()
    package = importlib.import_module("lightning.pytorch")
    trainer = Trainer(
        **OFF,
        max_epochs=1,
        strategy=Strategy("cpu"),
        logger=Logger(tmp_path),
        enable_checkpointing=False,
        callbacks=[OOMPruningCallback(trial), Later()],
    )
    with pytest.raises(optuna.TrialPruned, match=r"out of memory in forward: 2\.0 GiB requested"):
        trainer.fit(module_of(package, Fault("forward"), 1), datamodule=Data())
    assert seen == ["callback", "data", "strategy", "failed", "teardown"]
    assert trainer.state.stage is None
