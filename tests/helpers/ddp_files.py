"""A small data set and model for runs on several ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.helpers.small_models import WORDS, save_model

ROWS, BATCH = 17, 8  # the last batch has one row, so that a rank has none
CLASSES = ("no", "perhaps", "yes")


def write_rows(path: Path, rows: int, seed: int) -> str:
    random = torch.Generator().manual_seed(seed)
    lines = ["text_a,text_b,label"]
    for row in range(rows):
        sizes = torch.randint(1, 14, (2,), generator=random).tolist()
        a, b = (" ".join(WORDS[i] for i in torch.randint(0, 40, (size,), generator=random)) for size in sizes)
        lines.append(f"{a},{b},{CLASSES[(0, 0, 0, 1, 2)[row % 5]]}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def make_files(folder: Path) -> dict[str, str]:
    """A model with dropout, rows, and a cache."""
    return {
        "model": save_model(folder / "model", outputs=3, dropout=0.2),
        "train": write_rows(folder / "train.csv", ROWS, 1),
        "val": write_rows(folder / "val.csv", 11, 2),
        "cache": str(folder / "cache"),
    }


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative norm; of key biases against the whole, as their gradient is zero but for rounding."""
    whole = torch.stack([value.double().norm() for value in theirs.values()]).norm()
    return max(
        float((ours[name] - value).norm() / (whole if name.endswith("key.bias") else value.norm()))
        for name, value in theirs.items()
        if value.norm() > 0
    )
