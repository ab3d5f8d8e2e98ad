"""Ordinary modules: effective batches stay what was asked for, whatever batch size is found."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from lightning_bge.callbacks.micro_batch import finder as finder_module
from lightning_bge.callbacks.micro_batch.config import MemoryConfig
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.callbacks.oom import OOMHandler
from lightning_bge.errors import ConfigError
from lightning_bge.runtime.memory import LARGEST_HEAP, Limit
from tests.helpers.rank_processes import run_ranks
from tests.helpers.small_models import quiet_trainer
from tests.helpers.trial_steps import ALL, FakeMeter

pytestmark = [
    pytest.mark.usefixtures("forgetful"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]
NO_MARGIN = MemoryConfig(min_speedup=None, safety_margin=0.0, cache=False)
WIDTH = 3


class Numbers(Dataset[dict[str, Any]]):
    """Samples of features and a target."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(rows)
        self.x = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
        self.y = torch.randn(rows, generator=generator, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"x": self.x[row], "y": self.y[row]}


class Ordinary(LightningModule):
    """A module as anybody writes it, whose steps fit with so many rows."""

    def __init__(self, rows: int = 53, batch_size: int = 12, largest: int = 4, **loader: Any) -> None:
        super().__init__()
        self.batch_size, self.largest, self.loader = batch_size, largest, loader
        self.data, self.made, self.sizes = Numbers(rows), [0], list[int]()
        self.net = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.shown: list[list[float]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if len(batch["x"]) > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        self.sizes.append(len(batch["x"]))
        return nn.functional.mse_loss(self.net(batch["x"]).squeeze(-1), batch["y"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val", self.net(batch["x"]).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def collate(self, samples: list[Any]) -> Any:
        self.made.append(len(samples))
        return default_collate(samples)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=self.batch_size, collate_fn=self.collate, **self.loader)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=self.batch_size)


class Gradients(Callback):
    """The gradients of each optimizer step, and the trainer's steps at each validation."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.validated: list[int] = []
        self.options: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.options = [pl_module.batch_size, trainer.accumulate_grad_batches]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(torch.cat([parameter.grad.flatten() for parameter in pl_module.parameters()]))

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """A machine with much memory, on which only the module's own limit counts."""

    def choose(module: Any) -> None:
        monkeypatch.setattr(finder_module, "limits", lambda *_: [Limit("RLIMIT_AS", 10**9, 0, raises=True)])
        monkeypatch.setattr(finder_module, "make_meter", lambda *_, **__: FakeMeter(module))

    return choose


def fit(module: Any, *callbacks: Callback, **options: Any) -> Trainer:
    trainer = quiet_trainer(callbacks=list(callbacks), **{"max_epochs": 2, **options})
    trainer.fit(module)
    return trainer


def expected_gradients(start: nn.Module, data: Numbers, rows: int, effective: int, epochs: int = 2) -> list[Tensor]:
    """Plain gradient descent on the mean loss of each effective batch."""
    found = []
    for _ in range(epochs):
        for at in range(0, rows, effective):
            chosen = slice(at, min(at + effective, rows))
            loss = nn.functional.mse_loss(start(data.x[chosen]).squeeze(-1), data.y[chosen])
            gradients = torch.autograd.grad(loss, list(start.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(start.parameters(), gradients, strict=True):
                    parameter -= 0.1 * gradient
            found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return found


CASES: list[tuple[dict[str, Any], dict[str, Any], int, int]] = [  # module, trainer, rows of an epoch, size found
    ({}, {}, 53, 4),  # the last batch, and the last effective batch, are smaller
    ({"largest": 5}, {}, 53, 4),  # 5 does not divide 12
    ({}, {"accumulate_grad_batches": 3}, 53, 4),
    ({"largest": 100}, {"accumulate_grad_batches": 3}, 53, 36),  # a larger one than was asked for
    ({"largest": 1000}, {"accumulate_grad_batches": 10}, 53, 60),  # one batch is all of an epoch
    ({"rows": 1, "batch_size": 8}, {}, 1, 1),
    ({"drop_last": True}, {}, 48, 4),
    ({"drop_last": True, "largest": 100}, {"accumulate_grad_batches": 3}, 48, 12),
    ({}, {"limit_train_batches": 3}, 36, 4),
    ({"largest": 100}, {"limit_train_batches": 3, "accumulate_grad_batches": 2}, 36, 12),
    ({}, {"limit_train_batches": 0.5}, 24, 4),
    ({}, {"overfit_batches": 2}, 24, 4),
]


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize(("options", "settings", "rows", "size"), CASES)
def test_each_steps_gradient_is_that_of_the_mean_over_its_rows(
    options: dict[str, Any], settings: dict[str, Any], rows: int, size: int, measured: Any
) -> None:
    module, seen, finder = Ordinary(**options), Gradients(), MicroBatchFinder(NO_MARGIN)
    effective = module.batch_size * settings.get("accumulate_grad_batches", 1)
    plain = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    plain.load_state_dict(module.net.state_dict())
    measured(module)
    trainer = fit(module, finder, seen, **settings)
    expected = expected_gradients(plain, module.data, rows, effective)
    assert finder.micro_batch_size == size
    assert seen.options == [size, effective // size]
    assert len(seen.seen) == len(expected) == trainer.global_step
    for found, gradient in zip(seen.seen, expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-9)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.net.state_dict()[name], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("settings", [{"val_check_interval": 2}, {"val_check_interval": 0.5}, {}])
def test_validations_begin_after_the_same_steps(settings: dict[str, Any], measured: Any) -> None:
    plain, seen = Gradients(), Gradients()
    fit(Ordinary(largest=100), plain, **settings)
    measured(module := Ordinary())
    trainer = fit(module, MicroBatchFinder(NO_MARGIN), seen, limit_val_batches=3, **settings)
    assert seen.validated == plain.validated
    assert trainer.num_val_batches == [9]
    assert (trainer.limit_val_batches, trainer.val_check_interval) == (3, settings.get("val_check_interval", 1.0))


def test_all_else_is_as_without_it(measured: Any) -> None:
    class Random(Ordinary):
        def __init__(self, **options: Any) -> None:
            super().__init__(generator=torch.Generator().manual_seed(2), shuffle=True, **options)
            self.norm, self.seen = nn.BatchNorm1d(WIDTH).double(), list[Any]()

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            batch = {**batch, "x": self.norm(nn.functional.dropout(batch["x"]))}
            self.seen.append((random.random(), np.random.rand(), batch["x"].clone()))
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    found = []
    for finders in ([], [MicroBatchFinder(NO_MARGIN)]):
        seed_everything(1)
        measured(module := Random(largest=12))
        trainer = fit(module, *finders)
        state = {"module": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict(), "seen": module.seen}
        found.append(({**state, "random": torch.get_rng_state()}, trainer.fit_loop.state_dict()))
        assert module.batch_size == 12
    assert len(found[0][0]["seen"]) == 10
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)
    assert found[0][1] == found[1][1]


def test_the_attribute_may_be_a_hyperparameter_of_the_data_module(tmp_path: Path, measured: Any) -> None:
    class Data(LightningDataModule):
        def __init__(self, rows_per_batch: int = 12) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.data = Numbers(53)

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(self.data, batch_size=self.hparams["rows_per_batch"])

    class Module(Ordinary):
        train_dataloader = LightningModule.train_dataloader  # type: ignore[assignment]
        val_dataloader = LightningModule.val_dataloader  # type: ignore[assignment]
        validation_step = LightningModule.validation_step  # type: ignore[assignment]

    module, data, finder = Module(largest=7), Data(), MicroBatchFinder(NO_MARGIN, batch_arg_name="rows_per_batch")
    measured(module)
    trainer = quiet_trainer(callbacks=[finder, Gradients()], max_epochs=1)
    trainer.fit(module, datamodule=data)
    assert finder.micro_batch_size == 6
    assert set(module.sizes[-9:]) == {6, 5}
    assert (data.hparams["rows_per_batch"], module.batch_size, trainer.accumulate_grad_batches) == (12, 12, 1)


def test_trial_batches_are_made_of_the_largest_samples(measured: Any) -> None:
    class Texts(Dataset[Any]):
        def __len__(self) -> int:
            return 300

        def __getitem__(self, row: int) -> Any:
            return {"x": torch.zeros(2 if row == 217 else 1, WIDTH).double(), "y": torch.tensor(0.0).double()}

    class Padded(Ordinary):
        def collate(self, samples: list[Any]) -> Any:
            self.made.append(len(samples))
            longest.append(max(len(sample["x"]) for sample in samples))
            return default_collate([{**sample, "x": sample["x"][0]} for sample in samples])

    longest: list[int] = []
    measured(module := Padded(batch_size=4))
    module.data = Texts()  # type: ignore[assignment]
    fit(module, MicroBatchFinder(NO_MARGIN), limit_val_batches=0, max_epochs=1)
    trials = longest[:-75]
    assert len(trials) >= 6
    assert set(trials) == {2}


def test_after_an_oom_the_next_fit_begins_with_half_the_size(measured: Any, tmp_path: Path) -> None:
    config = MemoryConfig(min_speedup=None, safety_margin=0.0)
    measured(module := Ordinary(largest=6))
    finder = MicroBatchFinder(config, tmp_path)
    fit(module, finder)
    assert finder.micro_batch_size == 6

    class Grows(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.largest = 5

    handler, module = OOMHandler(), Ordinary(largest=6)
    trainer = quiet_trainer(callbacks=[finder, handler, Grows()], max_epochs=1)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit(module)
    assert (module.batch_size, trainer.accumulate_grad_batches, finder.micro_batch_size) == (12, 1, 3)
    again = MicroBatchFinder(config, tmp_path)
    fit(module, again, handler)
    assert (again.micro_batch_size, again.tried) == (3, [])


def test_a_resumed_run_keeps_the_size_and_the_heap_of_its_checkpoint(
    measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finder_module, "choose_heap", lambda probe, search, answer, **_: (answer, LARGEST_HEAP))

    class Saved(Ordinary):
        def __init__(self, batch_size: int = 12, largest: int = 4) -> None:
            super().__init__(batch_size=batch_size, largest=largest)
            self.save_hyperparameters("batch_size")

    measured(module := Saved())
    path = tmp_path / "last.ckpt"

    class Save(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 2 and not path.exists():
                trainer.save_checkpoint(path)

    seen = Gradients()
    fit(module, MicroBatchFinder(NO_MARGIN), Save(), seen)
    assert torch.load(path, weights_only=True)["hyper_parameters"] == {"batch_size": 12}
    asked: list[int | None] = []
    monkeypatch.setattr(finder_module, "limit_malloc", lambda largest=None: asked.append(largest))
    resumed, finder, rest = Saved(largest=6), MicroBatchFinder(NO_MARGIN), Gradients()
    trainer = quiet_trainer(callbacks=[finder, rest], max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")
        trainer.fit(resumed, ckpt_path=path)
    assert (finder.micro_batch_size, rest.options) == (4, [4, 3])
    assert trainer.global_step == 10
    assert finder.tried == []
    assert asked == [LARGEST_HEAP, None]  # in training and after it


@pytest.mark.parametrize(("rows", "largest", "size"), [(53, 5, 3), (53, 2, 3), (54, 5, 4), (49, 5, 12)])
def test_batch_normalization_gets_no_batch_of_one_row(rows: int, largest: int, size: int, measured: Any) -> None:
    class Norm(Ordinary):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.norm = nn.BatchNorm1d(WIDTH).double()

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return super().training_step({**batch, "x": self.norm(batch["x"])}, batch_idx)

    measured(module := Norm(rows=rows, largest=largest))
    finder = MicroBatchFinder(NO_MARGIN)
    if largest < size:  # 2 of 53 and all of 49 rows but 12, which was asked for, leave one row
        with pytest.raises(torch.OutOfMemoryError):
            fit(module, finder)
        assert finder.reason.startswith("not even this fits")
    else:
        fit(module, finder)
    assert finder.micro_batch_size == size


def test_speed_decides_too(measured: Any) -> None:
    class Steady(FakeMeter):  # as many rows a second whatever the size, from 16 on
        def now(self) -> float:
            self.seconds += 0.01 * max(self.data.made[-1], 16)
            return self.seconds

    measured(module := Ordinary(rows=300, batch_size=256, largest=256))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finder_module, "make_meter", lambda *_, **__: Steady(module))  # type: ignore[arg-type]
        finder = MicroBatchFinder(MemoryConfig(cache=False))
        fit(module, finder)
    assert finder.micro_batch_size == 16
    assert "over half of it" in finder.reason


@pytest.mark.parametrize(("largest", "size"), [(11, 6), (12, 6), (13, 6), (14, 12), (1000, 12)])
def test_the_whole_effective_batch_is_taken_where_the_margin_is_left_too(
    largest: int, size: int, measured: Any
) -> None:
    measured(module := Ordinary(largest=largest))
    finder = MicroBatchFinder(MemoryConfig(min_speedup=None, safety_margin=0.1, cache=False))
    fit(module, finder, max_epochs=1)
    assert finder.micro_batch_size == size
    assert max(rows for rows, *_ in finder.tried) <= 14


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"limit_train_batches": 0}])
def test_nothing_is_searched_where_little_or_nothing_is_trained(options: dict[str, Any], measured: Any) -> None:
    measured(module := Ordinary(largest=100))
    finder, seen = MicroBatchFinder(NO_MARGIN), Gradients()
    fit(module, finder, seen, **options)
    assert (finder.micro_batch_size, finder.tried) == (None, [])
    assert "the batch size stays" in finder.reason
    assert len(seen.seen) == (1 if "fast_dev_run" in options else 0)


def test_without_a_limit_the_batch_size_stays() -> None:
    finder, seen = MicroBatchFinder(), Gradients()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finder_module, "limits", lambda *_: [])
        fit(Ordinary(largest=12), finder, seen)
    assert (finder.micro_batch_size, seen.options, finder.tried) == (12, [12, 1], [])
    assert finder.reason.startswith("no limit on memory is stated")


class NoLength(Sampler[int]):
    def __iter__(self) -> Any:
        return iter((0, 1))


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"batch_size": 0}, {}, "batch_size: expected the rows of a batch, 1 or more, got 0"),
    ({"batch_size": "auto"}, {}, "batch_size: expected the rows of a batch, 1 or more, got 'auto'"),
    ({"rows": 0}, {}, "expected a dataset of 1 sample or more"),
    ({}, {"train_dataloader": lambda self: DataLoader(self.data, batch_size=3)}, "which is 12, got batch_size 3"),
    ({}, {"train_dataloader": lambda self: DataLoader(Endless(), batch_size=12)}, "got an iterable dataset"),
    (
        {},
        {"train_dataloader": lambda self: DataLoader(self.data, batch_size=12, sampler=NoLength())},
        "got the sampler NoLength",
    ),
    ({}, {"train_dataloader": lambda self: [self.val_dataloader()]}, "got list"),
    ({}, {"val_dataloader": lambda self: [[1]]}, "expected val_dataloader to return a DataLoader"),
]


@pytest.mark.parametrize(("options", "methods", "text"), WRONG)
def test_what_cannot_be_cut_is_an_error_at_once(options: dict[str, Any], methods: dict[str, Any], text: str) -> None:
    module = type("Wrong", (Ordinary,), methods)(**options)
    with pytest.raises(ConfigError, match=text):
        fit(module, MicroBatchFinder(NO_MARGIN))


def test_a_loader_that_keeps_its_batch_size_is_an_error(measured: Any) -> None:
    class Keeps(Ordinary):
        def train_dataloader(self) -> DataLoader[Any]:
            if not hasattr(self, "kept"):
                self.kept = super().train_dataloader()
            return self.kept

    measured(module := Keeps())
    with pytest.raises(ConfigError, match="which is 4, got batch_size 12; read batch_size in train_dataloader"):
        fit(module, MicroBatchFinder(NO_MARGIN))
    assert module.batch_size == 12


def test_loaders_passed_to_fit_and_intervals_over_epochs_are_errors() -> None:
    module = Ordinary()
    with pytest.raises(ConfigError, match="got a loader passed to fit"):
        quiet_trainer(callbacks=[MicroBatchFinder(NO_MARGIN)]).fit(module, module.train_dataloader())
    with pytest.raises(ConfigError, match="got 53 rows in batches of 12; set check_val_every_n_epoch"):
        fit(module, MicroBatchFinder(NO_MARGIN), check_val_every_n_epoch=None, val_check_interval=7)


def on_two_ranks(folder: str) -> tuple[Any, ...]:
    """Plain DDP; on rank 1 less fits."""
    torch.manual_seed(0)
    module, finder, seen = Ordinary(rows=101), MicroBatchFinder(ALL, cache_dir=folder), Gradients()
    module.largest = 4 if os.environ["RANK"] == "1" else 12
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finder_module, "limits", lambda *_: [Limit("RLIMIT_AS", 10**6, 0, raises=True)])
        patch.setattr(finder_module, "make_meter", lambda *_, **__: FakeMeter(module))  # type: ignore[arg-type]
        warnings.filterwarnings("ignore")
        trainer = fit(module, finder, seen, devices=2, strategy="ddp", use_distributed_sampler=True)
    orders = []
    for epoch in range(2):
        trainer.train_dataloader.sampler.set_epoch(epoch)
        orders.append(list(trainer.train_dataloader.sampler))
    return finder.micro_batch_size, orders, [gradient.tolist() for gradient in seen.seen]


@pytest.mark.slow
def test_ranks_take_the_smallest_and_their_mean_gradient_is_exact(tmp_path: Path) -> None:
    first, second = run_ranks(on_two_ranks, str(tmp_path))
    assert (first[0], first[2]) == (3, second[2])
    torch.manual_seed(0)
    plain, data, gradients = Ordinary(rows=101), Numbers(101), iter(first[2])
    for rows in zip(first[1], second[1], strict=True):
        assert [len(of_rank) for of_rank in rows] == [51, 51]
        for at in range(0, 51, 12):
            chosen = [row for of_rank in rows for row in of_rank[at : at + 12]]
            loss = nn.functional.mse_loss(plain.net(data.x[chosen]).squeeze(-1), data.y[chosen])
            expected = torch.autograd.grad(loss, list(plain.parameters()))
            flat = torch.cat([gradient.flatten() for gradient in expected])
            torch.testing.assert_close(torch.tensor(next(gradients), dtype=torch.float64), flat, rtol=0, atol=1e-9)
            with torch.no_grad():
                for parameter, gradient in zip(plain.parameters(), expected, strict=True):
                    parameter -= 0.1 * gradient
    assert next(gradients, None) is None
