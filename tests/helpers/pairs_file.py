"""A file of labelled pairs of texts of several lengths."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.helpers.small_models import WORDS


def write_pairs(folder: Path, rows: int) -> str:
    """Write `train.csv` with the columns text_a, text_b and label, and return its path."""
    random = torch.Generator().manual_seed(3)
    lines = ["text_a,text_b,label"]
    for row in range(rows):
        a, b = (" ".join(WORDS[int(i)] for i in torch.randint(0, 40, (4 + row % 6,), generator=random)) for _ in "ab")
        lines.append(f"{a},{b},{row % 2}")
    path = folder / "train.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)
