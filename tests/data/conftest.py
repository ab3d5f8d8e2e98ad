from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BertTokenizer

os.environ.setdefault("OMP_NUM_THREADS", "1")

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


@pytest.fixture(scope="session")
def tokenizer() -> BertTokenizer:
    return build_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


@pytest.fixture
def pairs_file(write: Callable[[str, str | bytes], Path]) -> Path:
    """60 rows: two texts, a label (a third of them yes), 12 groups, a score."""
    lines = ["text_a\ttext_b\tlabel\tgroup\tscore"]
    for row, (a, b) in enumerate(random_texts(60, seed=1)):
        lines.append(f"{a}\t{b}\t{'yes' if row % 3 == 0 else 'no'}\tg{row // 5}\t{row / 10}")
    return write("pairs.tsv", "\n".join(lines) + "\n")
