"""`lightning-bge` on several ranks: real processes on a CPU, as the launcher starts them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file

from lightning_bge.cli import main as cli
from lightning_bge.errors import ConfigError
from tests.helpers.ddp_files import BATCH, difference, make_files
from tests.helpers.paths import ROOT
from tests.helpers.rank_processes import run_ranks


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_files(tmp_path_factory.mktemp("files"))


def options(files: dict[str, str], run_dir: Path, *more: str) -> list[str]:
    return [
        *("fit", "--run_dir", str(run_dir), "--model.name_or_path", files["model"], "--model.task", "multiclass"),
        *("--data.train_file", files["train"], "--data.val_file", files["val"], "--data.test_file", files["val"]),
        *("--data.cache_dir", files["cache"], "--data.max_length", "64", "--data.batch_size", str(BATCH)),
        *("--data.batching.max_tokens", "64"),
        *("--data.batching.eval_max_tokens", "40", "--model.dropout", "0"),
        *("--model.loss.class_weights", "balanced", "--trainer.max_epochs", "2", "--trainer.precision", "32-true"),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", *more),
    ]


def call(arguments: list[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the program in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    handlers = logging.getLogger().handlers[:]
    argv = patch.object(sys, "argv", ["lightning-bge", *arguments])
    with argv, warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            logging.getLogger().handlers[:] = handlers
    return status, out.getvalue(), err.getvalue()


def launch(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The program as from a shell: it starts its other ranks by itself."""
    here = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning"}
    command = [sys.executable, "-m", "lightning_bge.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def fitted(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same run on one device and on two."""
    folder = tmp_path_factory.mktemp("runs")
    status, _, err = call(options(files, folder / "1"))
    assert status == 0, err
    done = launch(options(files, folder / "2", "--trainer.devices", "2"))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "rank 1" not in done.stderr
    for once in ("metric: f1", "model_dir:"):
        assert done.stdout.count(once) == 1
    return folder


def test_fit_on_two_devices_ends_as_on_one(fitted: Path) -> None:
    ours, theirs = (load_file(fitted / name / "model" / "model.safetensors") for name in "21")
    assert difference(ours, theirs) < 1e-5
    ours, theirs = (json.loads((fitted / name / "summary.json").read_text()) for name in "21")
    for part in ("validation", "test"):
        assert ours[part] == pytest.approx(theirs[part], rel=1e-5)
    assert ours["epoch"] == theirs["epoch"]
    for name, rows in (("validation.csv", 11), ("test.csv", 11)):
        ours, theirs = (read_rows(fitted / folder / name) for folder in "21")
        assert [row["row"] for row in ours] == [str(row) for row in range(rows)]
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.keys() == other.keys()
            for key, value in mine.items():
                try:
                    assert float(value) == pytest.approx(float(other[key]), abs=1e-5)
                except ValueError:
                    assert value == other[key]


def test_the_balance_is_logged_and_the_pace_is_that_of_all(fitted: Path) -> None:
    epochs = [row for row in read_rows(fitted / "2" / "logs" / "version_0" / "metrics.csv") if row["train_loss"]]
    assert len(epochs) == 2
    for row in epochs:
        assert 0.5 <= float(row["train_balance"]) < 1  # a step with one row has 0.5
        assert float(row["train_sequences_per_s"]) > 0
        assert 0 <= float(row["train_data_wait"]) <= 1
    assert "train_balance" not in read_rows(fitted / "1" / "logs" / "version_0" / "metrics.csv")[0]


def test_a_finished_run_says_so_once_and_starts_nothing(fitted: Path, files: dict[str, str]) -> None:
    status, out, _ = call(options(files, fitted / "2", "--trainer.devices", "2"))
    assert status == 0
    assert out.count("is finished") == out.count("metric: f1") == 1
    assert "LOCAL_RANK" not in os.environ  # which a launch sets
    status, _, err = call(options(files, fitted / "2", "--trainer.devices", "2", "--data.batch_size", "4"))
    assert status == 2
    assert "data.batch_size: 8 in the folder, 4 requested" in err


def predict_and_validate(model: str, files: dict[str, str], output: str) -> list[tuple[int, str, str]]:
    common = [*("--model.name_or_path", model, "--data.cache_dir", files["cache"], "--trainer.accelerator", "cpu")]
    common += [*("--data.batching.eval_max_tokens", "40", "--trainer.precision", "32-true")]
    common += [*("--trainer.devices", "2")]
    predicted = call(["predict", *common, "--data.predict_file", files["val"], "--output", output])
    return [predicted, call(["test", *common, "--data.test_file", files["val"]])]


def test_predict_and_test_on_two_devices(fitted: Path, files: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "found.csv"
    first, second = run_ranks(predict_and_validate, str(fitted / "2" / "model"), files, str(output))
    assert [status for status, _, _ in (*first, *second)] == [0] * 4, (first, second)
    assert f"11 rows: {output}" in first[0][1]
    assert "test_f1" in first[1][1]
    assert [out for _, out, _ in second] == ["", ""]
    expected = read_rows(fitted / "2" / "test.csv")
    found = read_rows(output)
    names = [name for name in found[0] if name in expected[0] and name not in ("row", "label")]
    assert names
    for mine, other in zip(found, expected, strict=True):
        assert mine["label"] == other["label"]
        ours, theirs = ([float(one[name]) for name in names] for one in (mine, other))
        assert ours == pytest.approx(theirs, abs=1e-6)


# ------------------------------------------------------------------ failing


class FailOn(Callback):
    """Some ranks fail in the second step."""

    def __init__(self, ranks: list[int], defect: bool = False) -> None:
        self.ranks, self.defect = ranks, defect

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_rank in self.ranks and trainer.global_step == 1:
            raise RuntimeError("shapes differ") if self.defect else ConfigError("nothing to be done")


def faulty(ranks: list[int], defect: bool = False) -> list[str]:
    callback = {"class_path": "tests.cli.test_distributed.FailOn", "init_args": {"ranks": ranks, "defect": defect}}
    return ["--trainer.devices", "2", "--trainer.callbacks", json.dumps([callback])]


def test_a_user_error_of_rank_1_ends_the_run(files: dict[str, str], tmp_path: Path) -> None:
    done = launch(options(files, tmp_path / "run", *faulty([1])))
    assert done.returncode in (2, -9)  # -9 where Lightning was faster than the broken connection
    assert done.stderr.count("nothing to be done") == 1
    assert "lightning-bge: nothing to be done" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "summary.json").exists()


def fail(arguments: list[str]) -> tuple[int, str, str]:
    try:
        return call(arguments)
    except RuntimeError as error:
        return 1, "", str(error)


@pytest.mark.parametrize(("ranks", "defect"), [([0], False), ([0, 1], False), ([1], True)])
def test_one_rank_says_why(files: dict[str, str], tmp_path: Path, ranks: list[int], defect: bool) -> None:
    """Here somebody else starts the ranks, as torchrun does."""
    found = run_ranks(fail, options(files, tmp_path / "run", *faulty(ranks, defect)))
    assert found[ranks[0]][0] == (1 if defect else 2)
    assert all(status for status, _, _ in found)
    said = [err for _, _, err in found]
    text = "shapes differ" if defect else "nothing to be done"
    assert sum(text in err for err in said) == 1, said
    assert not any("Traceback" in err for err in said)


# ------------------------------------------------------------------ searching


@pytest.mark.parametrize("command", ["plan", "audit"])
def test_an_estimate_takes_one_device(files: dict[str, str], tmp_path: Path, command: str) -> None:
    arguments = options(files, tmp_path / "study", "--trainer.devices", "2")
    status, _, err = call([command, *arguments[1:], "--hpo.space", '{"data.batch_size": {"choices": [4, 8]}}'])
    assert status == 2
    assert f"trainer.devices: expected 1 for lightning-bge {command}, got 2" in err
    assert not (tmp_path / "study").exists()
