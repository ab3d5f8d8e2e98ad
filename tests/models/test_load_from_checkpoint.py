"""Hyperparameters as plain data, and a model that predicts from a checkpoint alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import AutoTokenizer

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError
from lightning_bge.models.classifier import CHECKPOINT_KEY, BGEClassifier
from lightning_bge.models.losses import LossConfig
from lightning_bge.models.memory_saving.lora import LoRAConfig
from lightning_bge.models.optimizer import OptimizerConfig, ScheduleConfig
from lightning_bge.types import Schema
from tests.helpers.small_models import Batches, cut_batch, quiet_trainer, random_sequences, save_model

SCHEMA = Schema("multiclass", ("x", "y", "z"), ("a", "b"), 32, threshold=0.5)
LABELS = torch.tensor([0, 1, 2, 1])
BATCH = cut_batch(random_sequences((9, 7, 5, 4), 45), LABELS, 2)
NESTED: dict[str, Any] = {
    "task": "multiclass",
    "loss": LossConfig(class_weights=[1.0, 2.0, 0.5], label_smoothing=0.1),
    "optimizer": OptimizerConfig(lr=1e-3, layer_decay=0.9),
    "schedule": ScheduleConfig("cosine", warmup=3),
    "dropout": 0.2,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora": {"lora": LoRAConfig(3, target_modules=["query", "value"])},
    "frozen": {"frozen_layers": 1, "gradient_checkpointing": True},
    "padded": {"attention": "padded"},
}


def train(folder: str, path: Path, **options: Any) -> BGEClassifier:
    module = BGEClassifier(folder, **{**NESTED, **options})
    trainer = quiet_trainer(max_epochs=2, limit_val_batches=0)
    trainer.fit(module, datamodule=Batches(SCHEMA, [BATCH]))
    trainer.save_checkpoint(path)
    return module


def logits(module: BGEClassifier) -> Tensor:
    with torch.no_grad():
        return module.eval()(BATCH)


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()])
def test_hyperparameters_are_plain_data_that_make_an_equal_module(options: dict[str, Any]) -> None:
    module = BGEClassifier("folder", **{**NESTED, **options})
    plain = json.loads(json.dumps(dict(module.hparams)))
    equal = BGEClassifier(**plain)
    assert equal.hparams == module.hparams
    assert equal.loss_config == module.loss_config
    assert equal.optimizer_config == module.optimizer_config
    assert equal.schedule_config == module.schedule_config
    assert plain["optimizer"]["lr"] == 1e-3
    assert plain["lora"].keys() == {"r", "alpha", "target_modules"}


def test_configs_may_be_dicts_of_some_of_their_fields() -> None:
    module = BGEClassifier("folder", optimizer={"lr": 1e-4}, lora={"r": 2})  # type: ignore[arg-type]
    assert module.optimizer_config == OptimizerConfig(lr=1e-4)
    assert module.hparams["lora"] == {"r": 2, "alpha": None, "target_modules": None}


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "modernbert", "deberta-v2"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_loaded_model_gives_the_same_logits_without_the_folder_of_the_encoder(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    if "lora" in options and kind != "bert":
        options = {"lora": {"r": 3}}  # the names of the layers differ
    folder = save_model(tmp_path / "start", kind, outputs=3)
    trained = train(folder, tmp_path / "run.ckpt", **options)
    shutil.rmtree(folder)
    state = torch.random.get_rng_state()
    loaded = BGEClassifier.load_from_checkpoint(tmp_path / "run.ckpt")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert loaded.schema == SCHEMA
    assert loaded.hparams == trained.hparams
    assert all(module.training for module in loaded.modules())
    assert torch.equal(logits(loaded), logits(trained))
    trains = {name: parameter.requires_grad for name, parameter in trained.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == trains
    assert loaded.net.packed == trained.net.packed
    [found] = quiet_trainer().validate(loaded, datamodule=Batches(SCHEMA, val=[BATCH]), verbose=False)
    [expected] = quiet_trainer().validate(trained, datamodule=Batches(SCHEMA, val=[BATCH]), verbose=False)
    assert found == expected


def test_a_checkpoint_is_plain_data(tmp_path: Path) -> None:
    train(save_model(tmp_path / "start", outputs=3), tmp_path / "run.ckpt", lora=LoRAConfig(2))
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert content["hyper_parameters"]["optimizer"]["lr"] == 1e-3
    assert content[CHECKPOINT_KEY]["schema"]["labels"] == ["x", "y", "z"]
    json.dumps([content["hyper_parameters"], content[CHECKPOINT_KEY]])


def test_balanced_weights_come_from_the_checkpoint(tmp_path: Path) -> None:
    module = BGEClassifier(save_model(tmp_path / "start", outputs=3), "multiclass", {"class_weights": "balanced"})  # type: ignore[arg-type]
    trainer = quiet_trainer(limit_val_batches=0)
    trainer.fit(module, datamodule=Batches(SCHEMA, [BATCH], class_counts=[1, 2, 1]))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = BGEClassifier.load_from_checkpoint(tmp_path / "run.ckpt")
    assert loaded.loss.weight.tolist() == module.loss.weight.tolist()


def test_arguments_can_be_changed_on_loading(tmp_path: Path) -> None:
    train(save_model(tmp_path / "start", outputs=3), tmp_path / "run.ckpt")
    loaded = BGEClassifier.load_from_checkpoint(tmp_path / "run.ckpt", optimizer={"lr": 0.5})
    assert loaded.optimizer_config == OptimizerConfig(lr=0.5)


def test_without_labels_nothing_is_predicted() -> None:
    with pytest.raises(ConfigError, match=r"has not been trained: use BGEClassifier\.load_from_checkpoint"):
        BGEClassifier("no-such-folder").predict(["a"])
    with pytest.raises(ConfigError, match="no weights yet"):
        BGEClassifier("no-such-folder").export("somewhere", None)  # type: ignore[arg-type]


# ------------------------------------------------------------------ a plain trainer, and a new process

PROGRAM = """
import json, sys
from lightning_bge import BGEClassifier
model = BGEClassifier.load_from_checkpoint(sys.argv[1])
found = model.predict([("w1 w2 w3", "w4"), ("w5", "w6 w7")])
print(json.dumps([found.scores.tolist(), found.labels]))
"""


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*smaller than the logging interval")
def test_a_model_trained_in_ten_lines_predicts_in_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_BGE_CACHE", str(tmp_path / "cache"))
    folder = save_model(tmp_path / "model", dropout=0.1)
    rows = [f"w{row} w{row + 1},w{row + 2},{'yes' if row % 2 else 'no'}" for row in range(24)]
    (tmp_path / "train.csv").write_text("\n".join(["text_a,text_b,label", *rows]) + "\n")

    data = TextDataModule(folder, train_file=str(tmp_path / "train.csv"), max_length=32)
    model = BGEClassifier(folder, optimizer={"lr": 1e-3})  # type: ignore[arg-type]
    trainer = L.Trainer(max_epochs=2, logger=False, default_root_dir=tmp_path, enable_progress_bar=False)
    trainer.fit(model, datamodule=data)

    assert isinstance(trainer.checkpoint_callback, ModelCheckpoint)
    path = trainer.checkpoint_callback.best_model_path
    found = model.predict([("w1 w2 w3", "w4"), ("w5", "w6 w7")], AutoTokenizer.from_pretrained(folder))
    process = subprocess.run([sys.executable, "-c", PROGRAM, path], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == [found.scores.tolist(), found.labels]
