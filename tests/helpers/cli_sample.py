"""The generated sample, small enough for a search of seconds."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning_bge.data.sample import write_sample
from lightning_bge.models.tiny_bert import build_tiny_bert


def write_small_sample(folder: Path) -> list[str]:
    """Write training and test rows; returns the texts and criteria of the training rows."""
    write_sample(folder, posts=30, test_posts=12)
    with (folder / "train.csv").open(newline="") as file:
        return [text for row in csv.DictReader(file) for text in (row["text"], row["criterion"])]


def write_sample_with_model(folder: Path) -> Path:
    """Write the rows, and a very small BERT that was made of them in `model`; returns the folder."""
    texts = write_small_sample(folder)
    build_tiny_bert(folder / "model", texts, vocab_size=300, hidden_size=16, layers=1, max_positions=128)
    return folder
