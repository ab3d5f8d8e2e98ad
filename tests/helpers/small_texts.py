"""Small texts and a tokenizer made on the spot.

Not in conftest.py: there is one in the folder above too, and a data loader's worker, which imports a test's module by
name, may find that one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import BertTokenizer

WORDS = [f"w{i}" for i in range(40)]


def build_tokenizer(**options: Any) -> BertTokenizer:
    """A WordPiece tokenizer of 40 words, made on the spot."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##x"]
    return BertTokenizer(vocab={name: number for number, name in enumerate(names)}, **options)


def random_texts(n: int, seed: int = 0, longest: int = 12, columns: int = 2) -> list[tuple[str, ...]]:
    random = np.random.default_rng(seed)
    return [
        tuple(" ".join(random.choice(WORDS, size=random.integers(1, longest + 1))) for _ in range(columns))
        for _ in range(n)
    ]
