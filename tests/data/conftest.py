from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import BertTokenizer

from tests.helpers.small_texts import build_tokenizer, random_texts

os.environ.setdefault("OMP_NUM_THREADS", "1")


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
