"""Every mistake in an option or a YAML file has one line, of this program's words, and status 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.callbacks.micro_batch.config import MemoryConfig
from lightning_bge.cli.option_parser import OptionParser
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.metrics.config import MonitorConfig
from lightning_bge.trainer import BGETrainer

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
        (["--data.text_column", "text"], "there is no option --data.text_column. Did you mean --data.text_columns?"),
        (["--data.label", "label"], "there is no option --data.label. Did you mean --data.label_column?"),
        (["--data.train", "x"], "there is no option --data.train. Did you mean --data.train_file?"),
        (["--split.folds", "3"], "there is no option --split.folds. Did you mean --data.split.folds?"),
        (["--data", "{batch_size: 3, batch_size: 4}"], "data: line 1: the key batch_size is there already"),
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
        ("dta:", "there is no option dta"),
        ("split:", "there is no option split. Did you mean data.split?"),
        ("run_dir:", "expected a YAML mapping of options"),
        ("data:\n  batch_size: 3\n  batch_size: 4", "line 3: the key batch_size is there already, in line 2. Keep one"),
        ("data: {}\nmodel: {}\ndata: {}", "line 3: the key data is there already, in line 1"),
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
    "content",
    [
        *("", "# data:\n", "data:\n", "model:", "trainer:", "monitor:", "compile:", "memory:", "hpo:", "data:\nmodel:"),
        *(
            "data:\n  table:\n",
            "data: {split: , windows: null, batch_size: 32}",
            "model: {optimizer: null, lora: null}",
        ),
        *("hpo: {space: , enqueue: , pruner: }", "trainer: {callbacks: }"),
    ],
)
def test_an_empty_section_has_its_defaults(tmp_path: Path, content: str) -> None:
    parser = make_parser()
    (tmp_path / "run.yaml").write_text(content)
    found = parser.parse_args(["-c", str(tmp_path / "run.yaml")])
    found.pop("config")
    expected = parser.parse_args([])
    expected.pop("config")
    assert found.as_dict() == expected.as_dict()


def make_parser() -> OptionParser:
    parser = OptionParser(prog="program")
    parser.add_argument("-c", "--config", action="config")
    parser.add_class_arguments(BGEClassifier, "model")
    parser.add_class_arguments(TextDataModule, "data")
    parser.add_class_arguments(BGETrainer, "trainer")
    for name, kind in (("monitor", MonitorConfig), ("compile", CompileConfig), ("memory", MemoryConfig)):
        parser.add_argument(f"--{name}", type=kind, default=kind())
    parser.add_argument("--hpo", type=StudyConfig, default=StudyConfig())
    return parser


def test_a_section_of_a_later_file_that_is_empty_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: {batch_size: 7, table: {max_rows: 9}}")
    (tmp_path / "b.yaml").write_text("data: {table: }")
    found = make_parser().parse_args(["-c", str(tmp_path / "a.yaml"), "-c", str(tmp_path / "b.yaml")])
    assert (found.data.batch_size, found.data.table.max_rows) == (7, 9)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trainer.accelerator", "xyz"], "trainer: You selected an invalid accelerator name"),
        (["--trainer.devices", "0"], "trainer: `Trainer(devices=0)` value is not a valid input"),
        (["--trainer.devices", "x"], "trainer.devices: expected a number of devices, or their indices, got 'x'"),
        (["--trainer.accelerator", "cpu", "--trainer.devices", "[9]"], "trainer: `devices` selected with `CPUAccel"),
        (["--trainer.precision", "7"], "trainer.precision: expected one of auto, bf16-mixed, 16-mixed, 32-true, got 7"),
        (["--trainer.profiler", "xyz"], "trainer: When passing string value for the `profiler`"),
        (["--trainer.limit_train_batches", "2.5"], "trainer: You have passed invalid value 2.5 for limit_train"),
        (["--trainer.logger", "lightning.pytorch.loggers.CometLogger"], "class_path lightning.pytorch.loggers.Comet"),
        (["--seed_everything", "-1"], "lightning-bge: seed_everything: expected 0 ... 2**32 - 1, got -1"),
        (["--seed_everything", "true"], "lightning-bge: seed_everything: expected 0 ... 2**32 - 1, got true"),
        (["--seed_everything", "x"], "lightning-bge: seed_everything: expected 0 ... 2**32 - 1, got x"),
        (["--run_dir="], "run_dir: expected a folder, got nothing"),
        (["--trainer.max_time", "soon"], "trainer: `Timer(duration='soon')` is not a valid duration"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_arguments_that_the_trainer_refuses(run: Run, options: list[str], args: list[str], message: str) -> None:
    check(*run("fit", *options, *args), message)
