"""Long texts whose last word decides: windows learn it, where truncation cannot."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.tiny_bert import build_tiny_bert

WORDS = ["river", "house", "green", "seven", "cloud", "paper", "stone", "train"]


def write_rows(path: Path, rows: int, seed: int) -> list[str]:
    """Texts of 20 to 44 words that end in `good` or `bad`."""
    random, texts = np.random.default_rng(seed), []
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for row in range(rows):
            words = random.choice(WORDS, size=random.integers(20, 45)).tolist()
            texts.append(" ".join([*words, ("bad", "good")[row % 2]]))
            writer.writerow([texts[-1], ("no", "yes")[row % 2]])
    return texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows")
    texts = write_rows(folder / "train.csv", 160, seed=0)
    write_rows(folder / "test.csv", 40, seed=1)
    build_tiny_bert(folder / "model", texts, vocab_size=100, hidden_size=16, layers=1, max_positions=16)
    return folder


@pytest.mark.parametrize("windows", [True, False])
def test_windows_learn_what_stands_behind_the_limit(
    folder: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]], windows: bool
) -> None:
    chosen = ("--data.windows.stride", "4", "--data.windows.pooling", "max") if windows else ()
    files = ("--data.train_file", str(folder / "train.csv"), "--data.test_file", str(folder / "test.csv"))
    data = ("--data.text_columns", "[text]", "--data.max_length", "16", "--data.cache_dir", str(tmp_path / "cache"))
    model = ("--model.name_or_path", str(folder / "model"), "--model.optimizer.lr", "0.02")
    trainer = ("--trainer.max_epochs", "8", "--trainer.precision", "32-true", "--run_dir", str(tmp_path / "run"))
    status, _, err = run("fit", *model, *files, *data, *chosen, *trainer)
    assert status == 0, err
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["test"]["accuracy"]
    if not windows:
        assert found < 0.75
        return
    assert found > 0.95
    exported, output = tmp_path / "run" / "model", tmp_path / "scores.csv"
    assert json.loads((exported / "lightning_bge.json").read_text())["windows"]["stride"] == 4
    options = ("--data.predict_file", str(folder / "test.csv"), "--data.cache_dir", str(tmp_path / "cache"))
    status, _, err = run(
        "predict",
        "--model.name_or_path",
        str(exported),
        *options,
        "--trainer.precision",
        "32-true",
        "--output",
        str(output),
    )
    assert status == 0, err
    with output.open() as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    with (folder / "test.csv").open() as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    assert BGEClassifier(str(exported)).predict(texts).scores.tolist() == pytest.approx(scores, abs=2e-6)
