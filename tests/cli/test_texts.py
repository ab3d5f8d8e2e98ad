"""Texts on the command line and in YAML files, whatever YAML would make of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from lightning_bge.cli.option_parser import TEXTS, OptionParser
from lightning_bge.cli.texts import TextForm, text_arguments, text_loader, text_options
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError

Run = Callable[..., tuple[int, str, str]]
WORDS = ["no", "yes", "on", "off", "true", "null", "~", "0", "1", "01", "1.0", "1e3", "0x10", "1_000", "2024-01-01"]


@dataclass
class Inner:
    """Texts among other options."""

    names: tuple[str, ...] | None = None
    size: int = 1
    kind: Literal["a", "b"] = "a"


class Owner:
    """The same with a dataclass."""

    def __init__(
        self,
        file: str | list[str] | None = None,
        column: str = "x",
        limit: int | str = 3,
        inner: Inner = Inner(),  # noqa: B008
    ) -> None: ...


FORMS = text_options({"data": Owner})
load = text_loader(FORMS, yaml.safe_load)


def test_annotations_say_which_options_are_texts() -> None:
    assert {
        "data.file": TextForm(one=True, several=True, null=True),
        "data.column": TextForm(one=True),
        "data.inner.names": TextForm(several=True, null=True),
    } == FORMS


def test_every_file_and_column_of_the_data_module_is_a_text() -> None:
    names = [name for name in inspect.signature(TextDataModule).parameters if "file" in name or "column" in name]
    assert {f"data.{name}" for name in names} <= TEXTS.keys()
    assert {"data.table.labels", "model.name_or_path", "run_dir", "output"} <= TEXTS.keys()
    assert "data.batch_size" not in TEXTS


@pytest.mark.parametrize("word", WORDS)
def test_a_file_holds_the_text_that_stands_there(word: str) -> None:
    content = f"data:\n  column: {word}\n  inner: {{names: [{word}, x], size: 2}}\n  limit: 1\n"
    found = load(content)
    assert found == {"data": {"column": word, "inner": {"names": [word, "x"], "size": 2}, "limit": 1}}
    assert load(yaml.safe_dump(found)) == found  # as the run's config.yaml is read again


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("data: {file: null, inner: {names: }}", {"data": {"file": None, "inner": {"names": None}}}),
        ("data: {file: ~, column: ''}", {"data": {"file": None, "column": ""}}),
        ("data: {file: [1, no], inner: {names: 7}}", {"data": {"file": ["1", "no"], "inner": {"names": ["7"]}}}),
        ("data.column: no", {"data.column": "no"}),
        ("b: &b {column: no}\ndata: {<<: *b}", {"b": {"column": False}, "data": {"column": "no"}}),
        ("no: {column: no}\n1: 2", {False: {"column": False}, 1: 2}),
        ("data: [no]", {"data": [False]}),
        ("[no]", [False]),
    ],
)  # fmt: skip
def test_other_values_are_as_yaml_has_them(content: str, found: Any) -> None:
    assert load(content) == found


def test_a_column_named_null_is_refused_where_null_means_none() -> None:
    with pytest.raises(ConfigError, match="file: expected another name than 'null'"):
        load("data: {file: 'null'}")


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (["--data.inner.names", "[no, 01, null]"], ["--data.inner.names", '["no", "01", "null"]']),
        (["--data.inner.names=text"], ['--data.inner.names=["text"]']),
        (["--data.inner.names", "a: b"], ["--data.inner.names", '["a: b"]']),
        (["--data.inner.names", "@a"], ["--data.inner.names", '["@a"]']),
        (["--data.inner.names", "[ä, 😀]"], ["--data.inner.names", '["ä", "😀"]']),
        (["--data.inner.names", "null"], ["--data.inner.names", "null"]),
        (["--data.inner.names", "[a"], ["--data.inner.names", "[a"]),  # the parser refuses it
        (["--data.file", "no"], ["--data.file", "no"]),
        (["--data.file", "[1, 2]"], ["--data.file", '["1", "2"]']),
        (["--data.column", "[no]"], ["--data.column", "[no]"]),
        (["--data", "{column: no, limit: 1}"], ["--data", '{"column": "no", "limit": 1}']),
        (["--data", "file.yaml"], ["--data", "file.yaml"]),
        (["--other", "[no]", "--data.inner.names"], ["--other", "[no]", "--data.inner.names"]),
        (["--data.inner.names", "--other"], ["--data.inner.names", "--other"]),
    ],
)
def test_lists_on_the_command_line_become_json(args: list[str], found: list[str]) -> None:
    assert text_arguments(args, FORMS) == found


# ---------------------------------------------------------------------- through the program


@pytest.mark.parametrize("word", [*WORDS, "[a].csv", "{a}", "a: b", "@a"])
def test_the_parser_takes_texts_as_they_stand(word: str, tmp_path: Path) -> None:
    parser = OptionParser(prog="program")
    parser.add_class_arguments(TextDataModule, "data")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"data": {"train_file": "x", "label_column": word}}))
    parser.add_argument("--config", action="config")
    found = parser.parse_args(["--config", str(tmp_path / "a.yaml"), "--data.table.labels", f"[a, '{word}']"])
    assert (found.data.label_column, found.data.table.labels) == (word, ("a", word))
    found = parser.parse_args(["--data.label_column", word, "--data.table.labels", '["a", "b"]'])
    assert (found.data.label_column, found.data.table.labels) == (word, ("a", "b"))


def rows(path: Path, labels: tuple[str, str], columns: tuple[str, str] = ("text", "label")) -> str:
    lines = [f"good text {n},{labels[1]}\nbad text {n},{labels[0]}" for n in range(20)]
    path.write_text("\n".join([",".join(columns), *lines]) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("labels", "given"),
    [(("no", "yes"), "[no, yes]"), (("0", "1"), "[0, 1]"), (("off", "on"), "[on, off]"), (("01", "02"), "[01, 02]")],
)
@pytest.mark.parametrize("in_file", [False, True], ids=["option", "file"])
def test_labels_that_yaml_reads_as_something_else(
    run: Run, options: list[str], tmp_path: Path, labels: tuple[str, str], given: str, in_file: bool
) -> None:
    data = rows(tmp_path / "2024", labels, ("no", "1"))
    common = [*options, "--data.group_column", "null", "--data.table.format", "csv", "--trainer.max_epochs", "1"]
    if in_file:
        content = f"train_file: {data}\n  text_columns: no\n  label_column: 1\n  table: {{labels: {given}}}"
        (tmp_path / "run.yaml").write_text(f"data:\n  {content}\n")
        common += ["-c", str(tmp_path / "run.yaml")]
    else:
        common += ["--data.train_file", data, "--data.text_columns", "no", "--data.label_column", "1"]
        common += ["--data.table.labels", given]
    status, _, err = run("fit", *common)
    assert status == 0, err
    saved = tmp_path / "study" / "config.yaml"
    data_options = yaml.safe_load(saved.read_text())["data"]
    assert data_options["table"]["labels"] == given.strip("[]").split(", ")
    assert (data_options["text_columns"], data_options["label_column"]) == (["no"], "1")
    # what was written is read as the same run
    status, out, err = run("fit", "-c", str(saved))
    assert status == 0, err
    assert "is finished" in out
