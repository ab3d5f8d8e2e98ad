"""An exported folder in the hands of transformers and of sentence-transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder import load_classifier
from lightning_bge.models.metrics.predictions import scores
from lightning_bge.types import Schema, Task
from tests.helpers.small_models import (
    WORDS,
    Batches,
    cut_batch,
    quiet_trainer,
    random_sequences,
    save_model,
    small_model,
    word_tokenizer,
)

MAX_LENGTH = 16
LABELS = {"binary": ["no", "yes"], "multiclass": ["x", "y", "z"], "multilabel": ["x|z", "y", ""]}
# What a user of CrossEncoder passes; without it the folder says which function makes a score.
PEER_OPTIONS: dict[str, dict[str, Any]] = {"multiclass": {"apply_softmax": True}}


def make_texts(columns: int) -> list[tuple[str, ...]]:
    """Short, long and very uneven ones; most are over the limit."""
    random = np.random.default_rng(0)
    sizes = [(2, 3), (30, 2), (2, 30), (9, 9), (7, 6), (7, 7), (25, 25), (1, 14), (14, 1), (40, 11), (11, 40), (12, 13)]
    return [tuple(" ".join(random.choice(WORDS, size=n)) for n in size[:columns]) for size in sizes]


def predicted(
    tmp_path: Path, task: Task, kind: str = "bert", columns: int = 2, windows: dict[str, Any] | None = None
) -> tuple[BGEClassifier, TextDataModule, list[tuple[str, ...]]]:
    """A module that has predicted the rows of a file."""
    texts = make_texts(columns)
    if windows:  # the first text is in each window
        texts = [(" ".join(first.split()[:9]), second) for first, second in texts]
    names = ["text_a", "text_b"][:columns]
    rows = [
        dict(zip(names, row, strict=True)) | {"label": LABELS[task][i % len(LABELS[task])] if task in LABELS else i / 7}
        for i, row in enumerate(texts)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = save_model(tmp_path / "start", kind, outputs=3 if task in ("multiclass", "multilabel") else 1)
    data = TextDataModule(
        tokenizer=folder,
        task=task,
        train_file=str(path),
        predict_file=str(path),
        text_columns=tuple(names),
        max_length=MAX_LENGTH,
        cache_dir=str(tmp_path / "cache"),
        windows=windows or {},
    )
    module = BGEClassifier(folder, task)
    quiet_trainer().predict(module, datamodule=data, return_predictions=False)
    return module, data, texts


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel", "regression"])
def test_cross_encoder_gives_our_scores(tmp_path: Path, task: Task, kind: str) -> None:
    module, data, texts = predicted(tmp_path, task, kind)
    folder = module.export(tmp_path / "exported", data.new_tokenizer())
    ours = scores(task, module.predictions.logits)
    assert float(ours.std()) > 0.02

    peer = CrossEncoder(str(folder), device="cpu")
    theirs = peer.predict(texts, convert_to_tensor=True, show_progress_bar=False, **PEER_OPTIONS.get(task, {}))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)

    # token by token: pairs over the limit are cut where we have cut them
    theirs_ids = peer.preprocess(texts)
    [batch] = data.predict_dataloader()
    [micro] = batch.micro
    assert max(micro.lengths) == MAX_LENGTH
    for row, ids in zip(micro.rows.tolist(), micro.input_ids.split(micro.lengths), strict=True):
        mask = theirs_ids["attention_mask"][row].bool()
        assert theirs_ids["input_ids"][row][mask].tolist() == ids.tolist()


@pytest.mark.parametrize("columns", [1, 2])
def test_transformers_gives_our_logits(tmp_path: Path, columns: int) -> None:
    module, data, texts = predicted(tmp_path, "multiclass", columns=columns)
    folder = module.export(tmp_path / "exported", data.new_tokenizer())
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(*map(list, zip(*texts, strict=True)), truncation=True, padding=True, return_tensors="pt")
    assert encoded["input_ids"].shape[1] == MAX_LENGTH
    with torch.no_grad():
        logits = model(**encoded).logits
    torch.testing.assert_close(logits, module.predictions.logits, rtol=0, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert model.config.label2id == {"x": 0, "y": 1, "z": 2}


@pytest.mark.parametrize(
    ("task", "problem", "names"),
    [
        ("binary", None, {"0": "yes"}),
        ("multiclass", "single_label_classification", {"0": "x", "1": "y", "2": "z"}),
        ("multilabel", "multi_label_classification", {"0": "x", "1": "y", "2": "z"}),
        ("regression", "regression", {"0": "score"}),
    ],
)
def test_the_exported_configuration_describes_the_outputs(
    tmp_path: Path, task: Task, problem: str | None, names: dict[str, str]
) -> None:
    module, data, _ = predicted(tmp_path, task)
    text = (module.export(tmp_path / "exported", data.new_tokenizer()) / "config.json").read_text()
    config = json.loads(text)
    assert (config.get("problem_type"), config["id2label"]) == (problem, names)
    assert config["dtype"] == "float32"
    assert "packed" not in text
    assert str(tmp_path) not in text


def test_a_model_with_windows_gives_texts_that_fit_the_same_scores_in_the_peers(tmp_path: Path) -> None:
    module, data, texts = predicted(tmp_path, "binary", windows={"stride": 2})
    folder = module.export(tmp_path / "exported", data.new_tokenizer())
    ours = BGEClassifier(str(folder)).predict(texts).scores
    theirs = CrossEncoder(str(folder), device="cpu").predict(texts, convert_to_tensor=True, show_progress_bar=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    columns = map(list, zip(*texts, strict=True))
    with torch.no_grad():
        logits = model(**tokenizer(*columns, truncation=True, padding=True, return_tensors="pt")).logits
    fits = torch.tensor([len((first + " " + second).split()) + 3 <= MAX_LENGTH for first, second in texts])
    assert 2 <= int(fits.sum()) < len(texts) - 1
    for peer in (theirs, logits.sigmoid().squeeze(-1)):
        torch.testing.assert_close(peer[fits], ours[fits], rtol=0, atol=1e-5)
        assert float((peer[~fits] - ours[~fits]).abs().max()) > 1e-3


def test_own_program_reads_it_back(tmp_path: Path) -> None:
    module, data, _ = predicted(tmp_path, "binary")
    module.set_schema(replace(module.schema, threshold=0.321))
    folder = module.export(tmp_path / "exported", data.new_tokenizer())
    assert Schema.load(folder) == Schema("binary", ("no", "yes"), ("text_a", "text_b"), MAX_LENGTH, 0.321)

    again = BGEClassifier(str(folder))
    rows = TextDataModule(
        tokenizer=str(folder), predict_file=data.predict_file, cache_dir=str(tmp_path / "cache"), max_length=512
    )
    quiet_trainer().predict(again, datamodule=rows, return_predictions=False)
    assert torch.equal(again.predictions.logits, module.predictions.logits)
    assert again.schema == module.schema


def test_tokenizer_is_left_as_it_was_and_its_state_is_not_exported(tmp_path: Path) -> None:
    module, _, texts = predicted(tmp_path, "binary")
    tokenizer = word_tokenizer(model_max_length=99)
    tokenizer("w1 w2 w3", truncation=True, max_length=3, padding="max_length")
    folder = module.export(tmp_path / "exported", tokenizer)
    assert tokenizer.model_max_length == 99
    assert AutoTokenizer.from_pretrained(folder).model_max_length == MAX_LENGTH
    theirs = CrossEncoder(str(folder), device="cpu").predict(texts, convert_to_tensor=True, show_progress_bar=False)
    torch.testing.assert_close(theirs, scores("binary", module.predictions.logits), rtol=0, atol=1e-4)


# ------------------------------------------------------------------ whole or not at all


@pytest.fixture
def module(tmp_path: Path) -> BGEClassifier:
    """A module with weights, as it is after a run."""
    module = BGEClassifier(save_model(tmp_path / "start"))
    module.set_schema(Schema("binary", ("0", "1"), ("text",), MAX_LENGTH))
    module.configure_model()
    return module


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_older_folder_is_replaced_whole(tmp_path: Path, module: BGEClassifier) -> None:
    folder = module.export(tmp_path / "out" / "model", word_tokenizer())
    (folder / "leftover.safetensors").write_text("old")
    module.set_schema(replace(module.schema, threshold=0.9))
    assert module.export(str(folder), word_tokenizer()) == folder
    assert not (folder / "leftover.safetensors").exists()
    assert Schema.load(folder).threshold == 0.9
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("fault", ["model", "tokenizer", "schema"])
@pytest.mark.parametrize("older", [False, True])
def test_failure_leaves_what_was_there(
    tmp_path: Path, module: BGEClassifier, monkeypatch: pytest.MonkeyPatch, older: bool, fault: str
) -> None:
    folder = tmp_path / "out" / "model"
    tokenizer = word_tokenizer(model_max_length=99)
    if older:
        module.export(folder, tokenizer)
    before = listing(tmp_path / "out")

    def fail(self: Any, path: Any, *_: Any, **__: Any) -> None:
        Path(path, "half.bin").write_text("half")
        raise OSError(28, "No space left on device")

    owner = {"model": PreTrainedModel, "tokenizer": type(tokenizer), "schema": Schema}[fault]
    monkeypatch.setattr(owner, "save" if fault == "schema" else "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        module.export(folder, tokenizer)
    assert listing(tmp_path / "out") == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"] * older
    assert tokenizer.model_max_length == 99


def test_folder_of_something_else_is_not_deleted(tmp_path: Path, module: BGEClassifier) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="mine exists and is no exported model: name another folder"):
        module.export(tmp_path / "mine", word_tokenizer())
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_export_prints_nothing(tmp_path: Path, module: BGEClassifier, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    module.export(tmp_path / "model", word_tokenizer())
    assert capfd.readouterr() == ("", "")


def test_bf16_checkpoint_is_exported_in_fp32(tmp_path: Path) -> None:
    small_model("bert").bfloat16().save_pretrained(tmp_path / "bf16")
    module = BGEClassifier(str(tmp_path / "bf16"))
    module.set_schema(Schema("binary", ("0", "1"), ("text",), MAX_LENGTH))
    module.configure_model()
    folder = module.export(tmp_path / "model", word_tokenizer())
    assert {p.dtype for p in load_classifier(str(folder), 1).parameters()} == {torch.float32}
    assert AutoModelForSequenceClassification.from_pretrained(folder).dtype == torch.float32


def test_exported_weights_are_those_of_the_last_step(tmp_path: Path, module: BGEClassifier) -> None:
    batch = cut_batch(random_sequences((9, 5), vocabulary=45), torch.tensor([0.0, 1.0]), 1)
    quiet_trainer(max_epochs=3, limit_val_batches=0).fit(module, datamodule=Batches(module.schema, [batch]))
    folder = module.export(tmp_path / "model", word_tokenizer())
    stored = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in module.net.model.state_dict().items())
