"""Trials of a module that is not ours, and the checkpoints that continue them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler

from lightning_bge.hpo.trial.module_setup import ModuleTrialSetup, ResumableTrial
from lightning_bge.trainer import SILENT
from tests.helpers.other_project import Folds, Net, Split


class PausedError(Exception):
    """Raised at the end of an epoch."""


class Pause(Callback):
    """Notes the values of the epochs, and stops after one of them with a checkpoint."""

    def __init__(self, path: Path, epoch: int | None) -> None:
        self.path, self.epoch = path, epoch
        self.values: list[float] = []

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        self.values.append(float(trainer.callback_metrics["val_loss"]))
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)
            raise PausedError


def values(
    path: Path,
    *,
    pause: int | None = None,
    resumes: bool = False,
    kind: type[Net] = Net,
    data: type[Split] = Folds,
) -> list[float]:
    seed_everything(1, verbose=False)
    module, seen = kind(note=object()), Pause(path, pause)
    off: dict[str, Any] = dict.fromkeys(SILENT, False)
    trainer = Trainer(max_epochs=4, accelerator="cpu", callbacks=[seen, ResumableTrial()], **off)
    try:
        trainer.fit(module, data(), ckpt_path=path if resumes else None, weights_only=True)
    except PausedError:
        torch.rand(3)  # other trials draw meanwhile
    return seen.values


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_paused_trial_goes_on_as_if_it_had_not_been(tmp_path: Path, epoch: int) -> None:
    whole = values(tmp_path / "none.ckpt")
    before = values(tmp_path / "paused.ckpt", pause=epoch)
    after = values(tmp_path / "paused.ckpt", resumes=True)
    assert before + after == whole


def test_a_checkpoint_holds_no_hyperparameters(tmp_path: Path) -> None:
    values(tmp_path / "paused.ckpt", pause=0)
    assert not any("hyper" in name for name in torch.load(tmp_path / "paused.ckpt", weights_only=True))


def test_folds_are_selected_where_the_data_module_has_them() -> None:
    data = Folds()
    setup = ModuleTrialSetup(Net(), data, Trainer, dict)
    setup.begin_fold(1, [])
    assert data.fold == 1
    ModuleTrialSetup(Net(), Split(), Trainer, dict).begin_fold(1, [])
    ModuleTrialSetup(Net(), None, Trainer, dict).begin_fold(1, [])
    assert (setup.steps_per_epoch, setup.n_validation_rows, setup.resumes_within_epochs) == (None, None, False)


class Plateau(Net):
    """With a schedule that follows a metric."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        # at each epoch that is not better by far
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


class OwnGenerator(Split):
    """With a generator of the loader's own."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.part(held_out=False), 6, shuffle=True, generator=torch.Generator().manual_seed(3))


class OwnBatchSampler(Split):
    """With a batch sampler whose sampler has a generator."""

    def train_dataloader(self) -> DataLoader[Any]:
        rows = self.part(held_out=False)
        sampler = RandomSampler(rows, generator=torch.Generator().manual_seed(3))
        return DataLoader(rows, batch_sampler=BatchSampler(sampler, 6, drop_last=False))


class NumpySampler(Sampler[int]):
    """Draws from a generator of NumPy."""

    def __init__(self, rows: int) -> None:
        self.rows, self.generator = rows, np.random.default_rng(0)

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return iter(self.generator.permutation(self.rows).tolist())


class WithNumpySampler(Split):
    """With such a sampler."""

    def train_dataloader(self) -> DataLoader[Any]:
        rows = self.part(held_out=False)
        return DataLoader(rows, 6, sampler=NumpySampler(len(rows)))


class OfTraining(Plateau):
    """With a schedule that follows a metric of training, which Lightning computes after the checkpoints."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def configure_optimizers(self) -> Any:
        found = super().configure_optimizers()
        found["lr_scheduler"]["monitor"] = "train_loss"
        return found


class OwnSampler(Split):
    """With a sampler that has a generator."""

    def train_dataloader(self) -> DataLoader[Any]:
        rows = self.part(held_out=False)
        return DataLoader(rows, 6, sampler=RandomSampler(rows, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize(
    ("kind", "data"), [(Plateau, Split), (Net, OwnGenerator), (Net, OwnSampler), (Net, OwnBatchSampler)]
)
def test_what_lightning_does_not_keep_is_kept(tmp_path: Path, kind: type[Net], data: type[Split], epoch: int) -> None:
    whole = values(tmp_path / "none.ckpt", kind=kind, data=data)
    before = values(tmp_path / "paused.ckpt", pause=epoch, kind=kind, data=data)
    after = values(tmp_path / "paused.ckpt", resumes=True, kind=kind, data=data)
    assert before + after == whole


@pytest.mark.parametrize(
    ("module", "data", "options", "expected"),
    [
        (Net, Split, {}, []),
        (Plateau, Split, {}, []),
        (OfTraining, Split, {}, ["ReduceLROnPlateau does not see train_loss of the epoch"]),
        (Net, Split, {"reload_dataloaders_every_n_epochs": 1}, ["trainer.reload_dataloaders_every_n_epochs makes"]),
        (Net, OwnGenerator, {}, []),
        (
            Net,
            WithNumpySampler,
            {},
            ["the state of a sampler's generator, a Generator that is not torch's"],
        ),
    ],
)
def test_what_a_checkpoint_does_not_hold_is_said(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    module: type[Net],
    data: type[Split],
    options: dict[str, Any],
    expected: list[str],
) -> None:
    off: dict[str, Any] = dict.fromkeys(SILENT, False)
    callbacks = [Pause(tmp_path / "x.ckpt", 0), ResumableTrial()]
    trainer = Trainer(max_epochs=2, accelerator="cpu", callbacks=callbacks, **off, **options)
    with pytest.raises(PausedError):
        trainer.fit(module(), data())
    found = [one.getMessage() for one in caplog.records if one.name == "lightning_bge"]
    assert len(found) == len(expected)
    for text, part in zip(found, expected, strict=True):
        assert text.startswith(f"a run that goes on from a checkpoint differs a little: {part}")


def test_another_number_of_generators_is_said_and_none_is_given_the_state_of_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values(tmp_path / "paused.ckpt", pause=0, data=OwnGenerator)
    after = values(tmp_path / "paused.ckpt", resumes=True, data=Split)
    assert len(after) == 3
    [message] = [one.getMessage() for one in caplog.records if one.name == "lightning_bge"]
    assert "the training loaders have 0 generators, and had 1 when it was written" in message
