"""The classes that a checkpoint names."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_bge.data.checkpoint_labels import checkpoint_labels
from lightning_bge.errors import ConfigError
from tests.helpers.small_models import small_config


@pytest.mark.parametrize(
    ("task", "names", "expected"),
    [
        ("binary", ("negative", "positive"), ("negative", "positive")),
        ("binary", ("yes", "no"), ("no", "yes")),
        ("binary", ("SUPPORTS", "REFUTES"), ("SUPPORTS", "REFUTES")),
        ("binary", ("1", "0"), ("0", "1")),
        ("binary", ("fraud", "not_fraud"), ("not_fraud", "fraud")),
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


def test_outputs_of_one_name_are_refused(tmp_path: Path) -> None:
    config = small_config("bert", 3)
    config.id2label = {0: "a", 1: "a", 2: "b"}
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"outputs of the same name, 'a', 'a', 'b'\. Correct id2label"):
        checkpoint_labels(str(tmp_path), "multiclass", None, False)
