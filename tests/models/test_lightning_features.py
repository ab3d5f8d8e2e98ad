"""Lightning's own options and callbacks with a module that steps by itself: each works, or is refused with a remedy."""

from __future__ import annotations

import copy
import csv
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from torch import Tensor

from lightning_bge.data.batches.config import BatchingConfig
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.tables.splits import SplitConfig
from lightning_bge.errors import ConfigError
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.models.optimizer import OptimizerConfig
from lightning_bge.models.trainer_options import TrainerOptions
from lightning_bge.runtime.log_once import log_once
from tests.helpers.pairs_file import write_pairs
from tests.helpers.small_models import Batches, cut_batch, quiet_trainer, random_sequences, save_model
from tests.models.test_effective_batch import BINARY

STEPS = 5  # of an epoch: 40 training rows in batches of 8
averages = pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), rows=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), dropout=0.1)


@pytest.fixture
def make_data(train_file: str, folder: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TextDataModule]:
    cache = tmp_path_factory.getbasetemp() / "cache"

    def make(batch_size: int = 8) -> TextDataModule:
        return TextDataModule(
            tokenizer=folder,
            train_file=train_file,
            max_length=32,
            batch_size=batch_size,
            cache_dir=str(cache),
            split=SplitConfig(folds=3),
            batching=BatchingConfig(max_tokens=64),
        )

    return make


class Run:
    """Trains, and keeps what was trained with."""

    def __init__(self, folder: str, make_data: Callable[..., TextDataModule]) -> None:
        self.folder, self.make_data = folder, make_data

    def __call__(self, *callbacks: Callback, batch_size: int = 8, clip: float | None = 1.0, **options: Any) -> Trainer:
        attention = options.pop("attention", "auto")
        optimizer = OptimizerConfig(lr=1e-2, max_grad_norm=clip)
        self.module = BGEClassifier(self.folder, optimizer=optimizer, attention=attention)
        self.data = self.make_data(batch_size)
        trainer = quiet_trainer(callbacks=list(callbacks), **{"max_epochs": 2, **options})
        trainer.fit(self.module, datamodule=self.data)
        return trainer

    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.module.state_dict().items()}


@pytest.fixture
def run(folder: str, make_data: Callable[..., TextDataModule]) -> Run:
    return Run(folder, make_data)


@pytest.fixture(autouse=True)
def forget_what_was_logged() -> None:
    log_once.cache_clear()


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, others[name]) for name, value in some.items())


class Seen(Callback):
    """Rows of each step, the norm of its gradients as the optimizer sees them, weights after it, validations."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.norms: list[float] = []
        self.weights: list[dict[str, Tensor]] = []
        self.rates: list[float] = []
        self.validated_at: list[int] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append(sorted(int(row) for micro in batch.micro for row in micro.rows))
        self.weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.validated_at.append(trainer.global_step)


# ---------------------------------------------------------------------- clipping and accumulation


def test_gradient_clip_val_is_the_largest_norm(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning_bge")
    seen = Seen()
    trainer = run(seen, gradient_clip_val=0.25, gradient_clip_algorithm="norm")
    assert max(seen.norms) == pytest.approx(0.25, rel=1e-4)
    assert "trainer.gradient_clip_val=0.25: gradients are clipped to a norm of 0.25, in place of 1" in caplog.messages
    assert (trainer.gradient_clip_val, trainer.accumulate_grad_batches) == (0.25, 1)  # as before
    found, module = run.weights(), run.module
    assert module.max_grad_norm == 1.0
    run(clip=0.25)
    assert same(found, run.weights())
    trainer.fit_loop.epoch_progress.reset()
    other = Seen()
    trainer.callbacks = [other]  # type: ignore[attr-defined]
    trainer.fit(BGEClassifier(run.folder), datamodule=run.make_data())  # the same trainer again
    assert max(other.norms) == pytest.approx(0.25, rel=1e-4)


def test_gradient_clip_val_0_switches_clipping_off(run: Run) -> None:
    seen = Seen()
    run(seen, gradient_clip_val=0)
    found = run.weights()
    run(clip=None)
    assert same(found, run.weights())
    assert max(seen.norms) > 1


@pytest.mark.parametrize(
    ("options", "clip", "message"),
    [
        ({"gradient_clip_val": 0.5}, 2.0, "gradient_clip_val=0.5 and model.optimizer.max_grad_norm=2.0 contradict"),
        ({"gradient_clip_val": 0.5}, None, "gradient_clip_val=0.5 and model.optimizer.max_grad_norm=None contradict"),
        ({"gradient_clip_val": 0}, 2.0, "gradient_clip_val=0 and model.optimizer.max_grad_norm=2.0 contradict"),
        ({"gradient_clip_val": -1}, 1.0, "gradient_clip_val: expected 0 or more, or null, got -1"),
        ({"gradient_clip_algorithm": "value"}, 1.0, "gradient_clip_algorithm: expected norm, got value"),
        ({"accumulate_grad_batches": 0}, 1.0, "accumulate_grad_batches: expected 1 or more, got 0"),
    ],
)
def test_options_that_contradict_each_other(
    run: Run, options: dict[str, Any], clip: float | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(clip=clip, **options)
    assert run.module.max_grad_norm == clip


def test_equal_values_are_no_contradiction(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning_bge")
    assert TrainerOptions(2.0).max_grad_norm(2.0) == 2.0
    assert TrainerOptions(0).max_grad_norm(None) is None
    assert TrainerOptions().max_grad_norm(None) is None
    assert not caplog.messages


def test_accumulated_batches_are_one_effective_batch(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning_bge")
    seen, other = Seen(), Seen()
    trainer = run(seen, accumulate_grad_batches=2)
    assert trainer.global_step == 2 * 3  # 16, 16 and 8 rows
    assert "trainer.accumulate_grad_batches=2: an optimizer step has 2 x 8 = 16 rows" in caplog.messages
    assert (trainer.accumulate_grad_batches, run.data.rows_per_step) == (2, 8)  # as before
    found = run.weights()
    run(other, batch_size=16)
    assert (seen.rows, seen.rates) == (other.rows, other.rates)
    assert same(found, run.weights())


def test_other_batches_cannot_be_accumulated(folder: str) -> None:
    batch = cut_batch(random_sequences((5, 4), 45), torch.ones(2), 1)
    data = Batches(BINARY, [batch], [batch])
    with pytest.raises(ConfigError, match=r"expected 1 without a TextDataModule, got 2: each batch of Batches is one"):
        quiet_trainer(accumulate_grad_batches=2).fit(BGEClassifier(folder), datamodule=data)


def test_a_trainer_has_its_options_back_after_an_error(run: Run) -> None:
    class Fail(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ValueError("of a callback")

    trainer = quiet_trainer(gradient_clip_val=0.5, accumulate_grad_batches=2, callbacks=[Fail()])
    module, data = BGEClassifier(run.folder), run.make_data()
    with pytest.raises(ValueError, match="of a callback"):
        trainer.fit(module, datamodule=data)
    assert (trainer.gradient_clip_val, trainer.accumulate_grad_batches) == (0.5, 2)
    assert (module.max_grad_norm, data.rows_per_step) == (1.0, 8)


# ---------------------------------------------------------------------- averages of weights


@averages
@pytest.mark.parametrize("attention", ["packed", "padded"])
def test_ema_weights_are_validated_saved_and_kept(run: Run, tmp_path: Path, attention: str) -> None:
    """Against an average that is written out; positions, which are whole numbers, stay what they were."""
    seen, checked = Seen(), list[dict[str, Tensor]]()

    class Validated(Callback):
        def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            checked.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    saves = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    run(EMAWeightAveraging(decay=0.9), seen, Validated(), saves, enable_checkpointing=True, attention=attention)
    mean: dict[str, Tensor] = {}
    after_epochs = []
    for number, weights in enumerate(seen.weights, start=1):
        for name, value in weights.items():
            mean[name] = 0.9 * mean[name] + 0.1 * value if name in mean else value
        if number % STEPS == 0:
            after_epochs.append(dict(mean))
    for found in (checked[-1], run.weights(), torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]):
        for name, value in after_epochs[1].items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(checked[0], after_epochs[0], rtol=1e-5, atol=1e-6)
    assert not same(run.weights(), seen.weights[-1])
    plain = BGEClassifier.load_from_checkpoint(tmp_path / "epoch=1.ckpt")
    assert same(run.weights(), plain.state_dict())
    buffers, expected = dict(run.module.named_buffers()), dict(plain.named_buffers())
    assert all(torch.equal(value, expected[name]) for name, value in buffers.items() if name in expected)


@averages
def test_training_goes_on_from_the_weights_themselves(run: Run) -> None:
    seen, other = Seen(), Seen()
    run(WeightAveraging(), seen)
    run(other)
    assert same(seen.weights[-1], other.weights[-1])


@averages
def test_a_run_with_an_average_is_resumed(run: Run, tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    run(EMAWeightAveraging(decay=0.5), Save())
    whole = run.weights()
    module = BGEClassifier(run.folder, optimizer=OptimizerConfig(lr=1e-2))
    trainer = quiet_trainer(callbacks=[EMAWeightAveraging(decay=0.5)], max_epochs=2)
    trainer.fit(module, datamodule=run.make_data(), ckpt_path=tmp_path / "0.ckpt", weights_only=True)
    assert same(whole, module.state_dict())


def test_a_copy_of_a_module_shares_its_encoder_cache() -> None:
    cache = EncoderCache()
    assert copy.deepcopy({"load": cache.load})["load"].__self__ is cache  # type: ignore[attr-defined]


# ---------------------------------------------------------------------- callbacks that can't work


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: StochasticWeightAveraging(1e-3), "take WeightAveraging or EMAWeightAveraging"),
        (lambda: GradientAccumulationScheduler({0: 2}), "set data.batch_size"),
        (BatchSizeFinder, "data.batching.max_tokens=auto"),
        (LearningRateFinder, "search model.optimizer.lr"),
        (BackboneFinetuning, "set model.frozen_layers"),
        (lambda: ModelPruning("l1_unstructured"), "Leave it out"),
        (SpikeDetection, "model.optimizer.max_grad_norm"),
    ],
)
def test_callbacks_that_cannot_work_are_refused_by_a_plain_trainer_too(
    run: Run, make: Callable[[], Callback], remedy: str
) -> None:
    with pytest.raises(ConfigError, match=f"can't be used, as .*{remedy}"):
        run(make())


# ---------------------------------------------------------------------- those that watch


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "lightning_logs" / "version_0" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_learning_rate_monitor_logs_the_rate_of_each_step(run: Run, tmp_path: Path) -> None:
    seen = Seen()
    run(LearningRateMonitor("step"), seen, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    logged = [float(row["lr-AdamW/pg1"]) for row in rows_of(tmp_path) if row.get("lr-AdamW/pg1")]
    assert logged == pytest.approx(seen.rates)


def test_device_stats_monitor(run: Run, tmp_path: Path) -> None:
    run(DeviceStatsMonitor(cpu_stats=True), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert any("DeviceStatsMonitor.on_train_batch_end" in name for name in rows_of(tmp_path)[0])


def test_a_timer_ends_a_run_after_a_step(run: Run) -> None:
    assert run(Timer({"microseconds": 1}, interval="step")).global_step == 1
    timer = Timer({"days": 1})
    assert run(timer).global_step == 2 * STEPS
    assert timer.time_elapsed("train") > 0


def test_early_stopping(run: Run) -> None:
    stopping = EarlyStopping("val_loss", patience=1, min_delta=100.0)
    assert run(stopping, max_epochs=9).global_step == 2 * STEPS
    assert stopping.stopped_epoch == 1


@pytest.mark.parametrize("kind", [SimpleProfiler, AdvancedProfiler])
def test_profilers_time_the_parts_of_a_step(run: Run, tmp_path: Path, kind: type[Any]) -> None:
    run(profiler=kind(tmp_path, "found"), max_epochs=1)
    [file] = tmp_path.iterdir()
    assert all(part in file.read_text() for part in ("optimizer_step", "run_training_batch", "validation_step"))


@pytest.mark.filterwarnings("ignore:The PyTorch Profiler default schedule will be overridden")
@pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end of each cycle")
def test_pytorch_profiler_sees_operations(run: Run, tmp_path: Path) -> None:
    trainer = run(profiler="pytorch", default_root_dir=str(tmp_path), max_epochs=1)
    assert "aten::" in trainer.profiler.summary()


# ---------------------------------------------------------------------- parts of the data, and when to stop


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled")
@pytest.mark.parametrize("part", [2, 0.4])
def test_overfit_batches_trains_on_the_same_rows_in_each_epoch(run: Run, part: float) -> None:
    seen = Seen()
    trainer = run(seen, overfit_batches=part, max_epochs=3)
    assert trainer.global_step == 6
    assert seen.rows[:2] == seen.rows[2:4] == seen.rows[4:]
    other = Seen()
    run(other, limit_train_batches=2)
    assert other.rows[:2] == seen.rows[:2]
    assert other.rows[2:] != other.rows[:2]  # other rows in the next epoch


def test_limits_on_batches_shorten_the_schedule_too(run: Run) -> None:
    seen = Seen()
    assert run(seen, limit_train_batches=2, limit_val_batches=1).global_step == 4
    assert seen.rates[-1] == pytest.approx(0.01 * 1 / 4)  # linear, no step of warm-up


def test_fast_dev_run(run: Run) -> None:
    seen = Seen()
    assert run(seen, fast_dev_run=True).global_step == 1
    assert seen.validated_at == [1]


def test_max_steps_ends_within_an_epoch(run: Run) -> None:
    seen = Seen()
    assert run(seen, max_steps=7, max_epochs=-1).global_step == 7
    assert seen.rates[-1] < seen.rates[-2] < seen.rates[1]
    assert seen.rates[-1] == pytest.approx(0.01 / 6)  # one step of warm-up


@pytest.mark.parametrize(("interval", "expected"), [(2, [2, 4, 7, 9]), (0.5, [2, 4, 7, 9]), (1.0, [5, 10])])
def test_val_check_interval_counts_optimizer_steps(run: Run, interval: float, expected: list[int]) -> None:
    seen = Seen()
    run(seen, val_check_interval=interval)
    assert seen.validated_at == expected


def test_detect_anomaly_names_the_operation(run: Run) -> None:
    run(detect_anomaly=True, max_epochs=1)

    class Wrong(BGEClassifier):
        def configure_model(self) -> None:
            super().configure_model()
            next(self.parameters()).data[:] = torch.nan

    trainer = quiet_trainer(detect_anomaly=True)
    with (
        pytest.warns(UserWarning, match="Error detected in"),
        pytest.raises(RuntimeError, match="returned nan values"),
    ):
        trainer.fit(Wrong(run.folder), datamodule=run.make_data())
