"""Every mistake in an option or a YAML file has one line, of this program's words, and status 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


def check(status: int, out: str, err: str, message: str) -> None:
    assert status == 2, out + err
    lines = err.strip().splitlines()
    assert lines[-1].startswith("lightning-bge: ")
    assert message in lines[-1]
    assert len(lines) == 1
    assert "usage" not in out + err


@pytest.mark.parametrize("command", ["fit", "hpo", "predict", "validate", "test", "plan", "audit"])
def test_an_unknown_option_is_named_with_the_nearest_one(run: Run, command: str) -> None:
    check(*run(command, "--data.max_lenght", "3"), "no option --data.max_lenght. Did you mean --data.max_length?")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data.frobnicate", "3"], "there is no option --data.frobnicate. `lightning-bge hpo --help` lists"),
        (["--data.max_length", "abc"], "data.max_length: expected a whole number, got abc. See `lightning-bge hpo"),
        (["--data.max_length="], "data.max_length: expected a whole number, got nothing"),
        (["--model.optimizer.lr", "fast"], "model.optimizer.lr: expected a number, got fast"),
        (["--model.task", "binry"], "model.task: expected one of binary, multiclass, multilabel, regression, got bin"),
        (["--model.task"], "--model.task: expected one argument"),
        (["-c"], "--config: expected one argument"),
        (["train.csv"], "expected options, which begin with --, got 'train.csv'"),
        (["--data.batch_size", "3", "4"], "expected options, which begin with --, got '4'"),
        (["--hpo.space", "{model.dropout: 3}"], "hpo.space: expected a mapping, got 3"),
        (["--hpo.space", "[1"], "hpo.space: expected a mapping, got [1"),
        (["--hpo.pruner", "median"], "hpo.pruner: expected a mapping of options, or a YAML file with one, got median"),
        (["--data.table.labels", "[a"], "data.table.labels: expected a list or null, got [a"),
        (["--data.table.labels", "[[a]]"], "data.table.labels: expected a text or null, got [['a']]"),
        (["--trainer.callbacks", "[{class_path: no.Such}]"], "trainer.callbacks: class_path no.Such: No module"),
        (["--trainer.callbacks", "EarlyStopping"], "EarlyStopping: the following arguments are required: monitor"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_wrong_option(run: Run, args: list[str], message: str) -> None:
    check(*run("hpo", *args), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: {max_lenght: 3}", "there is no option data.max_lenght. Did you mean data.max_length?"),
        ("data: {table: {max_rowz: 3}}", "there is no option data.table.max_rowz. Did you mean data.table.max_rows?"),
        ("fit: {x: 3}", "there is no option fit"),
        ("data: [1]", "data: expected a mapping of options, got [1]"),
        ("data: {table: [1]}", "data.table: expected a mapping of options, got [1]"),
        ("model: {lora: 3}", "model.lora: expected a mapping of options, got 3"),
        ("- 1", "expected a YAML mapping of options"),
        ("", "expected a YAML mapping of options"),
        ("data:", "expected a YAML mapping of options"),
        ("hpo: {space: [1, 2]}", "hpo.space: expected a mapping, got [1, 2]"),
        ("model: {task: x}", "model.task: expected one of binary"),
        ("a: &x 3\nb: *y", "is no YAML file: found undefined alias"),
        ("trainer: {callbacks: {class_path: a.B}}", "trainer.callbacks: class_path a.B: No module named 'a'"),
    ],
)
def test_a_wrong_yaml_file_is_named(run: Run, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    status, out, err = run("hpo", "-c", str(path))
    check(status, out, err, message)
    assert str(path) in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trainer.accelerator", "xyz"], "trainer: You selected an invalid accelerator name"),
        (["--trainer.devices", "0"], "trainer: `Trainer(devices=0)` value is not a valid input"),
        (["--trainer.devices", "x"], "trainer.devices: expected a number of devices, or their indices, got 'x'"),
        (["--trainer.accelerator", "cpu", "--trainer.devices", "[9]"], "trainer: `devices` selected with `CPUAccel"),
        (["--trainer.precision", "7"], "trainer.precision: expected one of auto, bf16-mixed, 32-true, got 7"),
        (["--trainer.profiler", "xyz"], "trainer: When passing string value for the `profiler`"),
        (["--trainer.limit_train_batches", "2.5"], "trainer: You have passed invalid value 2.5 for limit_train"),
        (["--trainer.logger", "lightning.pytorch.loggers.CometLogger"], "class_path lightning.pytorch.loggers.Comet"),
        (["--seed_everything", "-1"], "seed_everything: expected true, false, or 0 ... 2**32 - 1, got -1"),
        (["--run_dir="], "run_dir: expected a folder, got nothing"),
        (["--trainer.max_time", "soon"], "trainer: `Timer(duration='soon')` is not a valid duration"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_arguments_that_the_trainer_refuses(run: Run, options: list[str], args: list[str], message: str) -> None:
    check(*run("fit", *options, *args), message)
