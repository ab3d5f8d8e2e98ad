"""A very small search: 40 rows, a BERT of two layers, two folds of two epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from transformers import PreTrainedTokenizerBase

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.tables.splits import SplitConfig
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.trial.objective import Objective, TrialFiles
from lightning_bge.hpo.trial.text_setup import TextTrialSetup
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.metrics.config import MonitorConfig
from lightning_bge.models.optimizer import OptimizerConfig
from lightning_bge.trainer import quiet_trainer
from tests.helpers.small_models import VOCABULARY, small_model, word_tokenizer

SPACE = {"lr": {"low": 1e-4, "high": 1e-2, "log": True}, "dropout": {"choices": [0.0, 0.1, 0.3]}}


def write_files(folder: Path, dropout: float = 0.1) -> Path:
    """Model, tokenizer and rows of the search."""
    small_model("bert", outputs=1, dropout=dropout).save_pretrained(folder / "model")
    tokenizer: PreTrainedTokenizerBase = word_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    words = VOCABULARY[5:]
    rows = [f"{' '.join(words[i % 7 : i % 7 + 2 + i % 5])},{words[i % 11]},{i % 2}" for i in range(40)]
    (folder / "train.csv").write_text("\n".join(["text_a,text_b,label", *rows]) + "\n")
    return folder


def small_data(folder: Path, **changes: Any) -> TextDataModule:
    """The rows of the search, in batches of 8."""
    settings: dict[str, Any] = {"max_length": 32, "batch_size": 8, **changes}
    return TextDataModule(
        tokenizer=str(folder / "model"),
        train_file=str(folder / "train.csv"),
        cache_dir=str(folder / "cache"),
        **settings,
    )


def make(  # with oof_dir, paused_dir, predictions_dir, epochs and per_epoch besides the arguments of `Objective`
    folder: Path, extra: tuple[Callback, ...] = (), monitor: MonitorConfig | None = None, **changes: Any
) -> Objective:
    epochs = changes.get("epochs", 2)

    def build(params: dict[str, Any]) -> TextTrialSetup:
        data = small_data(folder, split=SplitConfig(folds=2))
        data.setup("fit")
        model = BGEClassifier(
            str(folder / "model"),
            optimizer=OptimizerConfig(lr=params["lr"]),
            dropout=params["dropout"],
            seed=params.get("seed_everything", 42),
        )
        settings = {
            "max_epochs": epochs,
            "precision": "32-true",
            "accelerator": "cpu",
            "callbacks": list(extra),
        }
        return TextTrialSetup(model, data, lambda **more: quiet_trainer(settings, **more), dict)

    steps = Steps(2, changes.pop("epochs", 2), changes.pop("per_epoch", 1))
    files = TrialFiles(
        changes.pop("oof_dir", folder / "oof"), changes.pop("paused_dir", None), changes.pop("predictions_dir", None)
    )
    monitor = monitor or MonitorConfig(metric="loss")
    return Objective(build=build, space=parse_space(SPACE), monitor=monitor, steps=steps, files=files, **changes)
