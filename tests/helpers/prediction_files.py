"""Files of predictions, read back."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path


def column(path: Path, name: str) -> list[str]:
    """A column of a CSV file."""
    with path.open(newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def predict_training_rows(run: Callable[..., tuple[int, str, str]], model_dir: str, files: Path, output: Path) -> None:
    """Write what `lightning-bge predict` gives for the training rows of the small search."""
    status, _, err = run(
        *("predict", "--model.name_or_path", model_dir, "--data.predict_file", str(files / "train.csv")),
        *("--data.cache_dir", str(files / "cache"), "--output", str(output), "--trainer.precision", "32-true"),
    )
    assert status == 0, err
