"""Several ranks, real processes on a CPU: the same results as one process."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from lightning_bge.data.batches.config import BatchingConfig
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.losses import LossConfig
from lightning_bge.models.optimizer import OptimizerConfig
from lightning_bge.runtime.distributed import UnwrappedDDP, choose_strategy
from lightning_bge.trainer import BGETrainer
from tests.helpers.ddp_files import BATCH, difference, make_files
from tests.helpers.rank_processes import run_ranks

QUIET = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_files(tmp_path_factory.mktemp("files"))


# ------------------------------------------------------------------ in one process and in two


class Watched(BGEClassifier):
    """Of the type that is asked for; no rank but the first starts from the model's weights."""

    def __init__(self, *args: Any, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(*args, **options)
        self.wanted = dtype
        self.gradients: list[dict[str, Tensor]] = []

    def configure_model(self) -> None:
        started = self.net is not None
        super().configure_model()
        self.to(self.wanted)
        if self.global_rank and not started:
            for parameter in self.parameters():
                parameter.data += self.global_rank


class Gradients(Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        found = {name: p.grad.clone() for name, p in pl_module.net.model.named_parameters()}
        pl_module.gradients.append(found)


class Cut(Callback):
    """Rank 1 has other micro-batches."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank:
            trainer.datamodule.set_micro_batch_size(45)


class RunOut(Callback):
    """Once, in the second micro-batch of the second step, the last rank's memory runs out."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.calls = 0
        if trainer.global_rank == trainer.world_size - 1:
            self.handle = pl_module.net.register_forward_hook(lambda *_: self.count(trainer))

    def count(self, trainer: Any) -> None:
        self.calls += trainer.global_step == 1
        if self.calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")


class Save(Callback):
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(f"{self.folder}/{trainer.global_step}.ckpt", weights_only=False)


def train(
    files: dict[str, str],
    callbacks: Sequence[Callback] = (),
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    plain: bool = False,
    checkpoint: str | None = None,
    ranks: int = 2,
) -> dict[str, Any]:
    """Two epochs on all ranks there are -> what a rank knows at the end."""
    module = Watched(
        files["model"],
        "multiclass",
        LossConfig(class_weights=[1.0, 4.0, 0.3], label_smoothing=0.1),
        OptimizerConfig(lr=1e-3),
        dropout=dropout,
        dtype=dtype,
    )
    batching = BatchingConfig(max_tokens=64, eval_max_tokens=40)
    data = TextDataModule(
        files["model"],
        "multiclass",
        files["train"],
        files["val"],
        predict_file=files["val"],
        max_length=64,
        batch_size=BATCH,
        cache_dir=files["cache"],
        batching=batching,
    )
    settings: dict[str, Any] = {**dict.fromkeys(QUIET, False), "accelerator": "cpu", "devices": ranks, "max_epochs": 2}
    settings |= {"callbacks": [Gradients(), *callbacks], "precision": "32-true"}
    foreign: dict[str, Any] = {"strategy": DDPStrategy(), "num_sanity_val_steps": 0}
    trainer = Trainer(**settings, **foreign) if plain else BGETrainer(**settings)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.predict(module, datamodule=data, **({"return_predictions": False} if plain else {}))
    return {
        "gradients": module.gradients,
        "weights": module.net.model.state_dict(),
        "metrics": metrics,
        "rows": module.predictions.rows.tolist(),
        "logits": module.predictions.logits,
        "failures": [record.where for record in module.oom_retry.records],
        "limit": data.micro_batch_size,
    }


def train_all(files: dict[str, str], folder: str) -> dict[str, dict[str, Any]]:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    narrow = {"dtype": torch.float32, "dropout": 0.2}
    return {
        "cut": train(files, [Cut()]),
        "plain": train(files, [Cut()], plain=True),
        "run out": train(files, [Cut(), RunOut()]),
        "whole": train(files, [Save(folder)], **narrow),
        "resumed": train(files, checkpoint=f"{folder}/2.ckpt", **narrow),
        "next epoch": train(files, checkpoint=f"{folder}/3.ckpt", **narrow),
    }


@pytest.fixture(scope="module")
def alone(files: dict[str, str]) -> dict[str, Any]:
    return train(files, ranks=1)


@pytest.fixture(scope="module")
def together(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(train_all, files, str(tmp_path_factory.mktemp("checkpoints")))


@pytest.mark.parametrize("name", ["cut", "plain", "run out"])
def test_gradients_of_every_step_are_those_of_one_process(
    alone: dict[str, Any], together: list[dict[str, dict[str, Any]]], name: str
) -> None:
    assert len(alone["gradients"]) == 6
    for rank in (0, 1):
        found = together[rank][name]
        assert len(found["gradients"]) == 6
        assert difference(found["gradients"][0], alone["gradients"][0]) < 1e-9
        # later ones are taken where AdamW went, which makes as much of a bias' rounding as of a gradient
        assert all(difference(*pair) < 1e-6 for pair in zip(found["gradients"], alone["gradients"], strict=True))
        assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-6)
        assert found["rows"] == alone["rows"] == list(range(11))
        torch.testing.assert_close(found["logits"], alone["logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cut", "plain", "run out", "whole", "resumed", "next epoch"])
def test_all_ranks_have_the_same_weights_and_metrics(together: list[dict[str, dict[str, Any]]], name: str) -> None:
    first, second = (rank[name] for rank in together)
    assert all(torch.equal(value, second["weights"][key]) for key, value in first["weights"].items())
    assert first["metrics"] == second["metrics"]
    assert "val_f1" in first["metrics"]


def test_a_rank_without_memory_repeats_its_share_alone(together: list[dict[str, dict[str, Any]]]) -> None:
    first, second = (rank["run out"] for rank in together)
    assert (first["failures"], first["limit"]) == ([], 64)
    assert second["failures"] == ["forward"]
    assert second["limit"] < 45


@pytest.mark.parametrize(("name", "steps"), [("resumed", 4), ("next epoch", 3)])
def test_a_resumed_run_ends_with_the_same_weights(
    together: list[dict[str, dict[str, Any]]], name: str, steps: int
) -> None:
    for rank in together:
        assert len(rank[name]["gradients"]) == steps
        assert all(torch.equal(value, rank["whole"]["weights"][key]) for key, value in rank[name]["weights"].items())


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("strategy", "devices", "nodes", "several"),
    [
        ("auto", 1, 1, False),
        ("auto", "1", 1, False),
        ("auto", [0], 1, False),
        ("auto", "0,", 1, False),
        ("auto", "auto", 1, False),
        ("auto", -1, 1, False),
        ("auto", 2, 1, True),
        ("auto", "2", 1, True),
        ("auto", "0,2", 1, True),
        ("auto", [0, 1], 1, True),
        ("auto", 1, 2, True),
        ("ddp", 1, 1, True),
    ],
)
def test_strategy(strategy: str, devices: Any, nodes: int, several: bool) -> None:
    chosen = choose_strategy(strategy, devices, nodes, "cpu")
    assert isinstance(chosen, UnwrappedDDP) if several else chosen == "auto"


def test_all_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for devices in ("auto", -1, "-1"):
        assert isinstance(choose_strategy("auto", devices, 1, "gpu"), UnwrappedDDP)
        assert choose_strategy("auto", devices, 1, "cpu") == "auto"


def test_other_strategies_are_refused_and_made_ones_left_alone() -> None:
    for wrong in ("fsdp", "ddp_spawn"):
        with pytest.raises(ConfigError, match=f"trainer.strategy: expected auto or ddp, got {wrong}"):
            BGETrainer(strategy=wrong, precision="32-true")
    for made in (DDPStrategy(), SingleDeviceStrategy(torch.device("cpu"))):
        assert choose_strategy(made, 2, 1, "cpu") is made
