"""A generated sample with a very small BERT, and commands that train on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.cli_sample import write_sample_with_model


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_with_model(tmp_path_factory.mktemp("sample"))


@pytest.fixture
def options(sample: Path, tmp_path: Path) -> list[str]:
    return [
        *("--model.name_or_path", str(sample / "model"), "--run_dir", str(tmp_path / "study")),
        *("--data.train_file", str(sample / "train.csv"), "--data.cache_dir", str(tmp_path / "cache")),
        *("--data.text_columns", "[text, criterion]", "--data.group_column", "post_id"),
        *("--data.max_length", "64", "--trainer.precision", "32-true", "--trainer.max_epochs", "2"),
    ]


@pytest.fixture
def search(options: list[str]) -> list[str]:
    space = '{"model.optimizer.lr": {"low": 1.0e-4, "high": 1.0e-2, "log": true}}'
    return ["hpo", *options, "--data.split.folds", "2", "--hpo.n_trials", "3", "--hpo.space", space]
