"""Whole runs with gradient checkpointing, frozen layers and LoRA: resumed, and exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification

from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder import load_classifier
from lightning_bge.models.optimizer import OptimizerConfig
from lightning_bge.types import Schema
from tests.helpers.memory_saving import LORA, same
from tests.helpers.small_models import (
    Batches,
    cut_batch,
    micro_batch,
    quiet_trainer,
    random_sequences,
    save_model,
    word_tokenizer,
)


class SaveFirstEpoch(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


Run = Callable[..., BGEClassifier]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two epochs of three steps, from the start or from a checkpoint, with one written after the first."""
    folder = save_model(tmp_path / "start", dropout=0.2)
    labels = torch.tensor([0.0, 1.0, 1.0, 0.0])
    batches = [cut_batch(random_sequences((9, 7, 5, 4), 45, seed), labels, 2) for seed in range(3)]

    def train(checkpoint: Path | None = None, save: Path | None = None, **options: Any) -> BGEClassifier:
        module = BGEClassifier(folder, optimizer=OptimizerConfig(lr=1e-2), **options)
        callbacks = [] if save is None else [SaveFirstEpoch(save)]
        trainer = quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=callbacks)
        data = Batches(Schema("binary", ("no", "yes"), ("text",), 16), batches)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        assert trainer.global_step == 6
        return module

    return train


@pytest.mark.parametrize("options", [{"lora": LORA}, {"frozen_layers": 1}], ids=["lora", "frozen"])
def test_resumed_run_ends_with_the_same_weights(run: Run, tmp_path: Path, options: dict[str, Any]) -> None:
    whole = run(save=tmp_path / "first.ckpt", **options).net.state_dict()
    assert same(run(tmp_path / "first.ckpt", **options).net.state_dict(), whole)


def test_recomputing_changes_nothing_in_a_run(run: Run) -> None:
    found = run(gradient_checkpointing=True).net.state_dict()
    assert same(found, run().net.state_dict())


def test_lora_trains_its_factors_and_is_exported_as_plain_weights(run: Run, tmp_path: Path) -> None:
    module = run(lora=LORA)
    start = load_classifier(module.name_or_path, 1, lora=LORA).state_dict()
    for name, value in module.net.state_dict().items():
        # the key's bias does not change the softmax
        assert (
            torch.equal(value, start[name]) == (".lora_" not in name and not name.startswith("model.classifier"))
            or "pooler" in name
        )
    before = {name: value.clone() for name, value in module.net.state_dict().items()}
    folder = module.export(tmp_path / "exported", word_tokenizer())
    assert same(module.net.state_dict(), before)
    assert not [path.name for path in folder.iterdir() if "adapter" in path.name]
    assert "lora" not in (folder / "config.json").read_text()

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()
    [ids] = random_sequences((9,), 45)
    ours = module.net.eval()(micro_batch([ids]))
    with torch.no_grad():
        torch.testing.assert_close(model(ids[None]).logits, ours, rtol=1e-5, atol=1e-5)
        theirs = CrossEncoder(str(folder), device="cpu").model(input_ids=ids[None]).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
