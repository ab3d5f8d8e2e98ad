"""The classes that a checkpoint names."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_bge.data.checkpoint_labels import checkpoint_labels
from tests.helpers.small_models import small_config


@pytest.mark.parametrize(
    ("task", "names", "expected"),
    [
        ("binary", ("negative", "positive"), ("negative", "positive")),
        ("binary", ("yes", "no"), ("no", "yes")),
        ("binary", ("SUPPORTS", "REFUTES"), ("SUPPORTS", "REFUTES")),
        ("binary", ("1", "0"), ("0", "1")),
        ("binary", ("entailment",), ("not entailment", "entailment")),
        ("binary", ("a", "b", "c"), ()),
        ("binary", ("LABEL_0", "LABEL_1"), ()),
        ("multiclass", ("c", "a", "b"), ("c", "a", "b")),
        ("multilabel", ("LABEL_0", "LABEL_1"), ()),
    ],
)
def test_names(tmp_path: Path, task: str, names: tuple[str, ...], expected: tuple[str, ...]) -> None:
    config = small_config("bert", len(names))
    config.id2label = dict(enumerate(names))
    config.save_pretrained(tmp_path)
    assert checkpoint_labels(str(tmp_path), task, None, False) == expected  # type: ignore[arg-type]


def test_a_folder_without_a_model_names_none(tmp_path: Path) -> None:
    assert checkpoint_labels(str(tmp_path), "binary", None, False) == ()
