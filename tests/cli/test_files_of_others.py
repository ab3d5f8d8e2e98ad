"""Files as other people have them, through `fit`: the right rows and labels are trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lightning_bge.types import Schema

Run = Callable[..., tuple[int, str, str]]
TEXTS = [f"{'good' if row % 2 else 'bad'} thing {row}" for row in range(40)]


def table(labels: list[Any], texts: list[str] = TEXTS, delimiter: str = ",") -> str:
    rows = [f"{text}{delimiter}{label}" for text, label in zip(texts, labels, strict=True)]
    return "\n".join([f"text{delimiter}label", *rows, ""])


def each(*names: Any) -> list[Any]:
    return [names[row % len(names)] for row in range(40)]


@pytest.fixture
def fit(run: Run, sample: Path, tmp_path: Path) -> Callable[..., tuple[int, str, Path]]:
    def call(content: str, *options: str, name: str = "train.csv") -> tuple[int, str, Path]:
        """Exit status, standard error, and the run folder."""
        path = tmp_path / name
        path.write_text(content)
        status, _, err = run(
            *("fit", "--model.name_or_path", str(sample / "model"), "--data.train_file", str(path)),
            *("--data.max_length", "32", "--data.text_columns", "text", "--data.cache_dir", str(tmp_path / "cache")),
            *("--trainer.max_epochs", "1", "--run_dir", str(tmp_path / "run"), *options),
        )
        return status, err, tmp_path / "run"

    return call


def rows_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "validation.csv", dtype={"truth": str, "label": str}, keep_default_na=False)


@pytest.mark.parametrize(
    ("labels", "given", "names"),
    [
        (each("no", "yes"), "[no, yes]", ("no", "yes")),
        (each("no", "yes"), "[yes, no]", ("yes", "no")),
        (each("0", "1"), "[0, 1]", ("0", "1")),
        (each("0.0", "1.0"), "[1, 0]", ("1", "0")),
        (each("01", "02"), "[01, 02]", ("01", "02")),
        (each("off", "on"), "[on, off]", ("on", "off")),
        (each("null", "x"), "[null, x]", ("null", "x")),
        (each("1e3", "2e3"), "['2e3', 1e3]", ("2e3", "1e3")),
        (each("True", "False"), "[false, true]", ("false", "true")),
    ],
)
@pytest.mark.parametrize("in_yaml", [False, True])
def test_label_names_are_texts(
    fit: Callable[..., tuple[int, str, Path]],
    labels: list[Any],
    given: str,
    names: tuple[str, str],
    in_yaml: bool,
    tmp_path: Path,
) -> None:
    config = tmp_path / "labels.yaml"
    config.write_text(f"data:\n  table:\n    labels: {given}\n")
    options = ("-c", str(config)) if in_yaml else ("--data.table.labels", given)
    status, err, folder = fit(table(labels), *options)
    assert status == 0, err
    schema = Schema.load(folder / "model")
    assert schema is not None
    assert schema.labels == names
    found = rows_of(folder)
    keys = {"True": "true", "False": "false", "0.0": "0", "1.0": "1"}
    assert [keys.get(labels[row], labels[row]) for row in found["row"]] == found["truth"].tolist()


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("t.csv", table(each(0, 1), [f"{text}, really" for text in TEXTS], ";"), "semicolon between fields"),
        ("t.csv", table(each(0, 1), TEXTS, "\t"), "tab between fields"),
        ("t.csv", table(each(0, 1), [f"{text}; {text}, x" for text in TEXTS], "|"), "vertical bar between fields"),
        ("t.tsv", table(each(0, 1)), "comma between fields"),
        ("t.json", json.dumps([{"text": t, "label": n} for t, n in zip(TEXTS, each(0, 1), strict=True)]), "one array"),
        (
            "t.json",
            "\n".join(json.dumps({"text": t, "label": n % 2}) for n, t in enumerate(TEXTS)),
            "one object a line",
        ),
    ],
)
def test_the_form_of_a_file_is_found_and_said(
    fit: Callable[..., tuple[int, str, Path]], name: str, content: str, form: str
) -> None:
    status, err, folder = fit(content, name=name)
    assert status == 0, err
    assert form in err
    assert rows_of(folder)["truth"].tolist() == [str(row % 2) for row in rows_of(folder)["row"]]


@pytest.mark.parametrize(
    ("test_labels", "train_labels"),
    [(each("0.0", "1.0"), each(0, 1)), (each("False", "True"), each(0, 1)), (each(0, 1), each("1.0", 1, "True", 0))],
)
def test_one_normal_form_of_labels_in_all_files(
    fit: Callable[..., tuple[int, str, Path]], tmp_path: Path, test_labels: list[Any], train_labels: list[Any]
) -> None:
    test = tmp_path / "test.csv"
    test.write_text(table(test_labels, [f"{text} again" for text in TEXTS]))
    status, err, folder = fit(table(train_labels), "--data.test_file", str(test))
    assert status == 0, err
    assert set(pd.read_csv(folder / "test.csv", dtype=str)["truth"]) == {"0", "1"}


@pytest.mark.parametrize(
    "labels",
    [
        each("\"['a', 'b']\"", "\"['a']\"", "['b']", "[]"),
        each('"[""a"", ""b""]"', '"[""a""]"', '"[""b""]"', "[]"),
        each("a|b", "a", "b", ""),
        each("\"('a', 'b')\"", "{'a'}", "['b']", "[]"),
    ],
)
def test_lists_in_cells_are_lists(fit: Callable[..., tuple[int, str, Path]], labels: list[str]) -> None:
    status, err, folder = fit(table(labels), "--model.task", "multilabel")
    assert status == 0, err
    schema = Schema.load(folder / "model")
    assert schema is not None
    assert schema.labels == ("a", "b")
    expected = ["a|b", "a", "b", None]
    found = pd.read_csv(folder / "validation.csv", dtype=str).astype(object)
    truth = [None if pd.isna(value) else value for value in found["truth"]]
    assert truth == [expected[int(row) % 4] for row in found["row"]]


def test_the_positive_label_is_said_before_training_and_stands_in_the_summary(
    fit: Callable[..., tuple[int, str, Path]],
) -> None:
    status, err, folder = fit(table(each(1, 2)))
    assert status == 0, err
    assert "'2' is the positive label, '1' the negative one" in err
    assert json.loads((folder / "summary.json").read_text())["positive_label"] == "2"
    assert "2" in (folder / "report.html").read_text()


def test_parts_with_a_pattern_are_one_file(fit: Callable[..., tuple[int, str, Path]], tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"part{number}.csv").write_text(table(each(0, 1)[:10], TEXTS[10 * number : 10 * number + 10]))
    status, err, folder = fit("", "--data.train_file", str(tmp_path / "part*.csv"), "--data.split.val_fraction", "0.5")
    assert status == 0, err
    assert rows_of(folder)["row"].max() > 30
