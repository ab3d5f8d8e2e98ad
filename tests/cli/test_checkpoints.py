"""Checkpoints of transformers in every command: heads are matched by name, and what cannot be trusted is refused."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_bge.models.tiny_bert import build_tiny_bert
from lightning_bge.types import Schema

Run = Callable[..., tuple[int, str, str]]
WORDS = ["river", "house", "green", "seven", "cloud", "paper", "stone", "train"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bert(tmp_path_factory.mktemp("encoder"), WORDS * 3, vocab_size=60, hidden_size=16, layers=1)


def texts(rows: int) -> list[str]:
    random = np.random.default_rng(0)
    return [" ".join(random.choice(WORDS, size=6)) for _ in range(rows)]


def write_rows(path: Path, labels: Sequence[str], rows: int = 24) -> str:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "other", "label"])
        for row, text in enumerate(texts(rows)):
            writer.writerow([text, text, labels[row % len(labels)]])
    return str(path)


def checkpoint(encoder: Path, folder: Path, names: Sequence[str]) -> str:
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=len(names), id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
    )
    with torch.no_grad():
        model.classifier.weight.normal_(generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return str(folder)


def softmax_of_transformers(folder: str) -> dict[str, list[float]]:
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    with torch.no_grad():
        score = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts(24)]).softmax(-1)
    return {model.config.id2label[number]: score[:, number].tolist() for number in range(score.shape[1])}


def common(model: str | Path, tmp_path: Path) -> list[str]:
    return [
        *("--model.name_or_path", str(model), "--data.cache_dir", str(tmp_path / "cache")),
        *("--data.max_length", "32", "--data.text_columns", "[text]", "--trainer.precision", "32-true"),
    ]


def predicted(path: Path) -> dict[str, list[str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize("command", ["predict", "test", "validate"])
def test_a_plain_encoder_is_refused(encoder: Path, tmp_path: Path, run: Run, command: str) -> None:
    file = write_rows(tmp_path / "rows.csv", ("0", "1"))
    option = {"predict": "predict_file", "test": "test_file", "validate": "val_file"}[command]
    output = ("--output", str(tmp_path / "scores.csv")) if command == "predict" else ()
    status, _, err = run(command, *common(encoder, tmp_path), f"--data.{option}", file, *output)
    assert status == 2
    assert f"model.name_or_path: {encoder} has no trained head: classifier.bias, classifier.weight" in err
    assert not (tmp_path / "scores.csv").exists()


@pytest.mark.parametrize("names", [("no", "yes"), ("yes", "no"), ("LABEL_0", "LABEL_1")])
def test_two_logits_predict_as_in_transformers(encoder: Path, tmp_path: Path, run: Run, names: tuple[str, str]) -> None:
    model = checkpoint(encoder, tmp_path / "checkpoint", names)
    file = write_rows(tmp_path / "rows.csv", ("0",))
    output = tmp_path / "scores.csv"
    status, _, err = run("predict", *common(model, tmp_path), "--data.predict_file", file, "--output", str(output))
    assert status == 0, err
    found, expected = predicted(output), softmax_of_transformers(model)
    yes = "yes" if "yes" in names else "LABEL_1"
    assert [float(score) for score in found["score"]] == pytest.approx(expected[yes], abs=2e-6)
    assert set(found["label"]) <= ({"no", "yes"} if "yes" in names else {"0", "1"})


def test_classes_in_another_order_are_scored_by_name(encoder: Path, tmp_path: Path, run: Run) -> None:
    model = checkpoint(encoder, tmp_path / "checkpoint", ("c", "a", "b"))
    file, output = write_rows(tmp_path / "rows.csv", ("a", "b", "c")), tmp_path / "scores.csv"
    options = ("--model.task", "multiclass", "--data.table.labels", "[a, b, c]", "--data.predict_file", file)
    status, _, err = run("predict", *common(model, tmp_path), *options, "--output", str(output))
    assert status == 0, err
    found = predicted(output)
    for name, expected in softmax_of_transformers(model).items():
        assert [float(score) for score in found[f"score:{name}"]] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--model.task", "multiclass", "--data.table.labels", "[a, b, d]"), "classes 'c', 'a', 'b', and those of the"),
        (("--model.task", "multiclass", "--data.table.labels", "[a, b]"), "a head of 3 outputs, 'c', 'a', 'b', and a"),
        ((), "a head of 3 outputs, 'c', 'a', 'b', and a binary task of these data has 1 or 2. Set model.task"),
    ],
)
def test_other_classes_are_refused(
    encoder: Path, tmp_path: Path, run: Run, options: tuple[str, ...], expected: str
) -> None:
    model = checkpoint(encoder, tmp_path / "checkpoint", ("c", "a", "b"))
    file = write_rows(tmp_path / "rows.csv", ("a", "b"))
    output = ("--output", str(tmp_path / "scores.csv"))
    status, _, err = run("predict", *common(model, tmp_path), *options, "--data.predict_file", file, *output)
    assert status == 2
    assert expected in err
    assert not (tmp_path / "scores.csv").exists()


def test_fit_goes_on_from_two_logits(encoder: Path, tmp_path: Path, run: Run) -> None:
    model = checkpoint(encoder, tmp_path / "checkpoint", ("yes", "no"))
    file = write_rows(tmp_path / "rows.csv", ("no", "yes"))
    options = ("--data.train_file", file, "--trainer.max_epochs", "1", "--model.optimizer.lr", "1e-9")
    status, _, err = run("fit", *common(model, tmp_path), *options, "--run_dir", str(tmp_path / "run"))
    assert status == 0, err
    assert "starts at random" not in err
    output, exported = tmp_path / "scores.csv", str(tmp_path / "run" / "model")
    expected = softmax_of_transformers(model)["yes"]
    run("predict", *common(exported, tmp_path), "--data.predict_file", file, "--output", str(output))
    assert [float(score) for score in predicted(output)["score"]] == pytest.approx(expected, abs=1e-5)
    (tmp_path / "run" / "model" / "lightning_bge.json").unlink()
    status, _, err = run("predict", *common(exported, tmp_path), "--data.predict_file", file, "--output", str(output))
    assert status == 0, err
    assert [float(score) for score in predicted(output)["score"]] == pytest.approx(expected, abs=1e-5)
    assert set(predicted(output)["label"]) <= {"not yes", "yes"}


def test_fit_says_that_a_head_for_other_classes_is_new(encoder: Path, tmp_path: Path, run: Run) -> None:
    model = checkpoint(encoder, tmp_path / "checkpoint", ("good", "bad"))
    file = write_rows(tmp_path / "rows.csv", ("no", "yes"))
    options = ("--data.train_file", file, "--trainer.max_epochs", "1", "--run_dir", str(tmp_path / "run"))
    status, _, err = run("fit", *common(model, tmp_path), *options)
    assert status == 0, err
    assert err.count("a head for the classes 'good', 'bad', and those of the data are 'no', 'yes'") == 1


@pytest.mark.parametrize(("columns", "chosen"), [(("a", "b"), "[text]"), (("text",), "[text, other]")])
@pytest.mark.parametrize("command", ["predict", "test", "validate"])
def test_pairs_and_single_texts_are_told_apart(
    encoder: Path, tmp_path: Path, run: Run, command: str, columns: tuple[str, ...], chosen: str
) -> None:
    model = checkpoint(encoder, tmp_path / "checkpoint", ("yes",))
    Schema("binary", ("no", "yes"), columns, 32).save(model)
    option = {"predict": "predict_file", "test": "test_file", "validate": "val_file"}[command]
    file = write_rows(tmp_path / "rows.csv", ("no", "yes"))
    options = [*common(model, tmp_path), "--data.text_columns", chosen, f"--data.{option}", file]
    status, _, err = run(command, *options)
    assert status == 2
    form = "pairs of texts (a, b)" if len(columns) == 2 else "single texts (text)"
    assert f"data.text_columns: {model} was trained on {form}, got {chosen.strip('[]')}" in err
