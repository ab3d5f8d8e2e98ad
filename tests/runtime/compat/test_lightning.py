"""The private names of Lightning that this package uses are there, and do what it needs of them."""

from __future__ import annotations

from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_bge.runtime.compat import lightning as compat
from tests.helpers.small_models import quiet_trainer

MISSING = "Lightning {} has no {} any more: change `lightning_bge.runtime.compat.lightning`"


def test_the_hook_before_a_transfer_is_applied() -> None:
    class Doubles(BoringModel):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return 2 * batch

    module, found = Doubles(), []

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            found.append(compat.on_before_batch_transfer(pl_module, torch.ones(1)))

    name = "LightningModule._on_before_batch_transfer"
    assert hasattr(module, "_on_before_batch_transfer"), MISSING.format(lightning.__version__, name)
    quiet_trainer(callbacks=[Look()], limit_train_batches=1, limit_val_batches=0).fit(
        module, torch.utils.data.DataLoader(torch.ones(2, 32))
    )
    assert found == [2.0]


def test_callbacks_loggers_and_log_are_silent_and_come_back(tmp_path: Any) -> None:
    callback, module = Callback(), BoringModel()
    logger = CSVLogger(tmp_path)
    trainer = quiet_trainer(callbacks=[callback], logger=logger)
    before = list(trainer.callbacks)
    with compat.silenced(trainer, module):
        assert trainer.callbacks == []
        assert [type(one) for one in trainer.loggers] == [DummyLogger]
        module.log("never", 1.0)
    assert trainer.callbacks == before
    assert trainer.loggers == [logger]
    assert "log" not in vars(module)


def test_a_trainer_of_one_process_has_no_rank_processes() -> None:
    assert compat.rank_processes(quiet_trainer()) is None


# ---------------------------------------------------------------------- what an audit observes


def test_training_batches_are_observed_before_the_copy_to_the_device_and_no_others() -> None:
    seen: list[Any] = []

    class Observe(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            assert hasattr(trainer.strategy, "batch_to_device"), MISSING.format(
                lightning.__version__, "Strategy.batch_to_device"
            )
            self.end = compat.observe_batches(trainer, seen.append)

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            self.end()
            assert "batch_to_device" not in vars(trainer.strategy)

    quiet_trainer(callbacks=[Observe()], limit_train_batches=2, limit_val_batches=1, max_epochs=1).fit(BoringModel())
    message = MISSING.format(lightning.__version__, "call of Strategy.batch_to_device for each training batch")
    assert len(seen) == 2, message


def test_callbacks_that_a_module_configures_are_removed_before_training() -> None:
    class Unwanted(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            raise AssertionError(MISSING.format(lightning.__version__, "Trainer.callbacks that setup can replace"))

    class Configures(BoringModel):
        def configure_callbacks(self) -> list[Callback]:
            return [Unwanted()]

    class Removes(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            compat.remove_callbacks(trainer, (Unwanted,))

    quiet_trainer(callbacks=[Removes()], limit_train_batches=1, limit_val_batches=0, max_epochs=1).fit(Configures())


def test_fits_of_all_trainers_are_counted_and_only_meanwhile() -> None:
    fit = lightning.Trainer.fit
    with compat.count_fits() as fits:
        assert fits() == 0
        for expected in (1, 2):
            quiet_trainer(limit_train_batches=1, limit_val_batches=0, max_epochs=1).fit(BoringModel())
            assert fits() == expected, MISSING.format(lightning.__version__, "Trainer.fit that can be replaced")
    assert lightning.Trainer.fit is fit


def test_fits_of_the_package_pytorch_lightning_are_counted_too() -> None:
    twin = pytest.importorskip("pytorch_lightning", reason="newer versions of lightning bring it")
    from pytorch_lightning.demos.boring_classes import BoringModel as TwinModel

    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    fit = twin.Trainer.fit
    with compat.count_fits() as fits:
        twin.Trainer(**off, limit_train_batches=1, limit_val_batches=0, max_epochs=1, accelerator="cpu").fit(
            TwinModel()
        )
        assert fits() == 1
    assert twin.Trainer.fit is fit


def test_loaders_are_made_anew_by_lightnings_own_names() -> None:
    found: list[Any] = []

    class Look(BoringModel):
        def on_fit_start(self) -> None:
            source = self.trainer.fit_loop._data_source
            assert source.is_module(), MISSING.format(lightning.__version__, "FitLoop._data_source")
            found.append(compat.train_loader(self.trainer))
            found.extend(compat.validation_loaders(self.trainer))
            assert self.trainer.train_dataloader is None

        def on_train_start(self) -> None:
            assert self.trainer.train_dataloader is not None
            compat.drop_loaders(self.trainer)
            assert self.trainer.train_dataloader is None, MISSING.format(lightning.__version__, "_combined_loader")

    quiet_trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=1).fit(Look())
    assert [len(loader) for loader in found] == [64, 64]


def test_the_training_loader_made_for_an_estimate_is_dropped() -> None:
    found = []

    class Look(BoringModel):
        def configure_optimizers(self) -> Any:
            loop = self.trainer.fit_loop
            name = "FitLoop._combined_loader"
            assert hasattr(loop, "_combined_loader"), MISSING.format(lightning.__version__, name)
            found.append((compat.estimated_steps(self.trainer), self.trainer.train_dataloader))
            return super().configure_optimizers()

    quiet_trainer(max_epochs=3, limit_train_batches=4, limit_val_batches=0).fit(Look())
    assert found == [(12, None)]


def test_an_average_of_weights_leaves_out_buffers() -> None:
    """Else position 3 of a moving average is position 2 after a few steps."""

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.register_buffer("positions", torch.arange(8))

    found = []
    for wanted in (False, True):
        callback, module = EMAWeightAveraging(decay=0.9), Module()
        if wanted:
            compat.average_parameters_alone(callback)
        assert callback._use_buffers is not wanted, MISSING.format(lightning.__version__, "use_buffers")
        callback.setup(quiet_trainer(), module, "fit")
        for _ in range(10):
            callback._average_model.update_parameters(module)  # type: ignore[union-attr]
        found.append(dict(callback._average_model.module.named_buffers())["positions"].tolist())  # type: ignore[union-attr]
    assert found[0] != list(range(8)) == found[1]
