"""Texts that no file or folder can have as its name, and names of models that are none: one message with the option."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.helpers.paths import ROOT

Run = Callable[..., tuple[int, str, str]]
NO_HOME, LONG = "~nouser/x", "a" * 300
OPTIONS = ("run_dir", "data.cache_dir", "model.name_or_path", "data.train_file")


def check(found: tuple[int, str, str], *parts: str) -> None:
    status, out, err = found
    assert status == 2, out + err
    assert len(err.strip().splitlines()) == 1, err
    for part in parts:
        assert part in err


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("value", "reason"),
    [(NO_HOME, "there is no user 'nouser'"), (LONG, "File name too long"), ("a\0b", "null byte")],
    ids=["home", "long", "nul"],
)
def test_an_option_that_can_be_no_path(
    run: Run, options: list[str], tmp_path: Path, option: str, value: str, reason: str
) -> None:
    section, _, name = option.partition(".")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({section: {name: value}} if name else {section: value}))
    check(run("fit", *options, "-c", str(tmp_path / "run.yaml")), f"lightning-bge: {option}: ", reason)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("value", [NO_HOME, LONG])
def test_other_paths(run: Run, options: list[str], sample: Path, value: str) -> None:
    predict = ["predict", *options, "--data.predict_file", str(sample / "test.csv")]
    check(run(*predict, "--output", value), "lightning-bge: output: ")
    check(run(*predict[:-1], value), "lightning-bge: data.predict_file: ")
    check(run("fit", *options, "--data.train_file", f"{value}*.csv"), "lightning-bge: data.train_file: ")
    check(run("fit", "-c", value), "lightning-bge: --config: ")
    for command in ("status", "report", "worker"):
        check(run(command, value), "lightning-bge: RUN: ")
    check(run("cache", "list", "--cache_dir", value), "lightning-bge: --cache_dir: ")


@pytest.mark.parametrize("command", ["fit", "predict", "test"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nope", "model.name_or_path: the folder ./nope does not exist"),
        ("/nope/model", "model.name_or_path: the folder /nope/model does not exist"),
        ("", "model.name_or_path: expected a folder or the name of a model"),
        ("FILE", "is a file. Name the folder that holds the model"),
    ],
)
def test_a_model_that_is_none(
    run: Run, options: list[str], sample: Path, command: str, name: str, message: str
) -> None:
    name = str(sample / "train.csv") if name == "FILE" else name
    files = [part for kind in ("predict", "test") for part in (f"--data.{kind}_file", str(sample / "test.csv"))]
    check(run(command, *options, *files, "--model.name_or_path", name), message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://x.org/a.csv", "https://x.org/a.csv is a URL, which can't be read. Download the file"),
        ("file:///tmp/a.csv", "file:///tmp/a.csv is a URL"),
        ("", "expected the name of a data file, got nothing"),
    ],
)
@pytest.mark.parametrize("option", ["data.train_file", "data.test_file"])
def test_a_data_file_that_is_none(run: Run, options: list[str], option: str, name: str, message: str) -> None:
    check(run("fit", *options, f"--{option}", name), f"lightning-bge: {option}: {message}")


def test_standard_output_may_be_closed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_bge.cli", "cache", "list", "--cache_dir", str(tmp_path)]
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    found = subprocess.run(closed, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
