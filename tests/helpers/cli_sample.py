"""The generated sample, small enough for a search of seconds."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning_bge.data.sample import write_sample


def write_small_sample(folder: Path) -> list[str]:
    """Write training and test rows; returns the texts and criteria of the training rows."""
    write_sample(folder, posts=30, test_posts=12)
    with (folder / "train.csv").open(newline="") as file:
        return [text for row in csv.DictReader(file) for text in (row["text"], row["criterion"])]
