"""Warm trials: the same values as cold ones, from one load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from small_models import VOCABULARY, small_model, word_tokenizer
from transformers import PreTrainedTokenizerBase

from lightning_bge.data import TextDataModule
from lightning_bge.data.splits import SplitConfig
from lightning_bge.hpo import Objective, Setup, parse_space
from lightning_bge.models import BGEClassifier, OptimizerConfig, load_classifier
from lightning_bge.models.metrics import MonitorConfig
from lightning_bge.trainer import quiet_trainer

SPACE = {"lr": {"low": 1e-4, "high": 1e-2, "log": True}, "dropout": {"choices": [0.0, 0.1, 0.3]}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_model("bert", outputs=1, dropout=0.1).save_pretrained(tmp_path / "model")
    tokenizer: PreTrainedTokenizerBase = word_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    words = VOCABULARY[5:]
    rows = [f"{' '.join(words[i % 7 : i % 7 + 2 + i % 5])},{words[i % 11]},{i % 2}" for i in range(40)]
    (tmp_path / "train.csv").write_text("\n".join(["text_a,text_b,label", *rows]) + "\n")
    return tmp_path


def make(folder: Path, **changes: Any) -> Objective:
    def build(params: dict[str, Any]) -> Setup:
        data = TextDataModule(
            tokenizer=str(folder / "model"),
            train_file=str(folder / "train.csv"),
            max_length=32,
            batch_size=8,
            cache_dir=str(folder / "cache"),
            split=SplitConfig(folds=2),
        )
        data.setup("fit")
        model = BGEClassifier(
            str(folder / "model"), optimizer=OptimizerConfig(lr=params["lr"]), dropout=params["dropout"]
        )
        settings = {"max_epochs": 2, "precision": "32-true", "accelerator": "cpu"}
        return Setup(model, data, lambda **more: quiet_trainer(settings, **more), dict)

    monitor = MonitorConfig(metric="loss")
    return Objective(build, parse_space(SPACE), monitor, 2, 2, folder / "oof", **changes)


class Cold:
    load = staticmethod(load_classifier)
    loads = nbytes = 0


def search(objective: Objective, trials: int = 4) -> optuna.Study:
    study = optuna.create_study(direction="minimize", sampler=optuna.samplers.RandomSampler(seed=1), study_name="s")
    study.optimize(objective, n_trials=trials)
    return study


def test_warm_trials_equal_cold_ones_bit_for_bit(folder: Path) -> None:
    warm = make(folder)
    found = search(warm)
    assert warm.encoder.loads == 1
    expected = search(make(folder, encoder=Cold()))
    for one, other in zip(found.trials, expected.trials, strict=True):
        assert one.params == other.params
        assert one.intermediate_values == other.intermediate_values
        assert one.values == other.values
    assert len({trial.params["dropout"] for trial in found.trials}) > 1
