"""Scores and labels for texts in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from lightning_bge.errors import ConfigError, DataError
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.types import Schema, Task
from tests.helpers.small_models import WORDS, save_model, small_model, word_tokenizer

TEXTS = [" ".join(WORDS[start : start + size]) for start, size in ((0, 3), (5, 12), (9, 1), (2, 30), (20, 7))]
PAIRS = [(first, second) for first, second in zip(TEXTS, TEXTS[::-1], strict=True)]
LABELS = ("x", "y", "z")
SCHEMAS: dict[Task, Schema] = {
    "binary": Schema("binary", ("no", "yes"), ("a", "b"), 16, threshold=0.5),
    "multiclass": Schema("multiclass", LABELS, ("a", "b"), 16),
    "multilabel": Schema("multilabel", LABELS, ("a", "b"), 16, threshold=0.4),
    "regression": Schema("regression", (), ("a", "b"), 16),
}


def make(folder: str, schema: Schema, **options: str) -> BGEClassifier:
    module = BGEClassifier(folder, schema.task, **options)  # type: ignore[arg-type]
    module.set_schema(schema)
    return module


@pytest.mark.parametrize("attention", ["packed", "padded"])
@pytest.mark.parametrize("task", SCHEMAS)
def test_scores_and_labels_are_those_of_transformers(tmp_path: Path, task: Task, attention: str) -> None:
    schema = SCHEMAS[task]
    folder = save_model(tmp_path, outputs=schema.num_outputs, dropout=0.3)
    module = make(folder, schema, attention=attention)
    found = module.predict(PAIRS)

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    encoded = AutoTokenizer.from_pretrained(folder)(
        *map(list, zip(*PAIRS, strict=True)), truncation=True, max_length=16, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**encoded).logits
    if task == "regression":
        expected, labels = logits[:, 0], None
    elif task == "binary":
        expected = logits[:, 0].sigmoid()
        labels = ["yes" if score >= 0.5 else "no" for score in expected]
    elif task == "multiclass":
        expected = logits.softmax(-1)
        labels = [LABELS[number] for number in logits.argmax(-1)]
    else:
        expected = logits.sigmoid()
        labels = ["|".join(name for name, score in zip(LABELS, row, strict=True) if score >= 0.4) for row in expected]
    torch.testing.assert_close(found.scores, expected, rtol=1e-4, atol=1e-5)
    assert found.labels == labels
    assert module.training  # dropout is on again, as before


def test_the_number_of_tokens_at_once_changes_nothing(tmp_path: Path) -> None:
    module = make(save_model(tmp_path), SCHEMAS["binary"])
    found = module.predict(PAIRS)
    for tokens in (1, 20, 40):
        torch.testing.assert_close(module.predict(PAIRS, max_tokens=tokens).scores, found.scores, rtol=1e-5, atol=1e-6)


def test_single_texts(tmp_path: Path) -> None:
    module = make(save_model(tmp_path), Schema("binary", ("no", "yes"), ("text",), 16))
    assert module.predict(TEXTS).scores.shape == (5,)
    assert torch.equal(module.predict(TEXTS).scores, module.predict([(text,) for text in TEXTS]).scores)


def test_an_exported_model_predicts_without_a_checkpoint(tmp_path: Path) -> None:
    module = make(save_model(tmp_path / "start"), SCHEMAS["binary"])
    found = module.predict(PAIRS)
    folder = module.export(tmp_path / "exported", word_tokenizer())
    exported = BGEClassifier(str(folder))
    assert exported.predict(PAIRS).labels == found.labels
    assert exported.schema == SCHEMAS["binary"]


def test_a_tokenizer_can_be_passed(tmp_path: Path) -> None:
    small_model("bert").save_pretrained(tmp_path)
    module, tokenizer = make(str(tmp_path), SCHEMAS["binary"]), word_tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    assert len(module.predict(PAIRS, tokenizer).labels or ()) == 5


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "at least one text"),
        (["a"], r"texts\[0\] must be a pair of strings \(a and b\), got 'a'"),
        ([("a", "b"), ("a", "b", "c")], r"texts\[1\] must be a pair of strings"),
        ([("a", None)], r"texts\[0\] must be a pair of strings"),
        ([{"a": "x", "b": "y"}], r"texts\[0\] must be a pair of strings"),  # its keys would be taken for the texts
        ([None], r"texts\[0\] must be a pair of strings"),
        ("ab", "texts must be a list of strings or of pairs of strings, got str"),
    ],
)
def test_texts_of_the_wrong_form_are_refused(tmp_path: Path, texts: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(save_model(tmp_path), SCHEMAS["binary"]).predict(texts)


def test_a_model_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"BGEClassifier\(folder\) with the folder of an exported model"):
        BGEClassifier(save_model(tmp_path)).predict(PAIRS)
