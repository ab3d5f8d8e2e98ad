"""A head by its class from the command line to predictions, in processes that do not know the class."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]
MODULE = """
from torch import nn


class TwoLayers(nn.Sequential):
    def __init__(self, in_features: int, out_features: int, width: int) -> None:
        super().__init__(nn.Linear(in_features, width), nn.GELU(), nn.Linear(width, out_features))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's own."""
    name = f"heads_of_{tmp_path.name}"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / f"{name}.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return name


def scores(path: Path) -> list[float]:
    with path.open() as file:
        return [float(row["score"]) for row in csv.DictReader(file)]


def test_a_run_predicts_what_it_has_scored(
    sample: Path, options: list[str], tmp_path: Path, run: Run, module: str
) -> None:
    head = ("--model.head", f"{{class_path: {module}.TwoLayers, init_args: {{width: 5}}}}")
    status, _, err = run("fit", *options, "--data.test_file", str(sample / "test.csv"), *head)
    assert status == 0, err
    folder, out = tmp_path / "study", tmp_path / "predicted.csv"
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["lightning_bge_head"] == {"class_path": f"{module}.TwoLayers", "init_args": {"width": 5}}
    predict = [sys.executable, "-m", "lightning_bge.cli", "predict", *options]
    predict += ["--model.name_or_path", str(folder / "model"), "--data.predict_file", str(sample / "test.csv")]
    predict += ["--output", str(out)]
    done = subprocess.run([*predict, *head], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert scores(out) == pytest.approx(scores(folder / "test.csv"), abs=1e-4)
    out.unlink()
    done = subprocess.run(predict, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{module}.TwoLayers comes from a checkpoint, and nothing is imported or made" in done.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    "finish", [("--hpo.calibration", "temperature", "--model.head.init_args.width", "4"), ("--hpo.ensemble", "true")]
)
def test_arguments_are_searched_and_the_winner_is_exported(
    search: list[str], tmp_path: Path, run: Run, module: str, finish: tuple[str, ...]
) -> None:
    space = json.dumps({"model.head.init_args.width": {"choices": [3, 7]}})
    command = [*search, "--model.head.class_path", f"{module}.TwoLayers", "--hpo.space", space]
    more = ["--hpo.n_trials", "2", "--hpo.baseline", "false", *finish]
    status, _, err = run(*command, *more)
    assert status == 0, err
    winner = json.loads((tmp_path / "study" / "summary.json").read_text())["best_params"]
    folder = tmp_path / "study" / "model"
    for path in folder.glob("**/config.json"):
        config = json.loads(path.read_text())
        assert config["lightning_bge_head"]["init_args"] == {"width": winner["model.head.init_args.width"]}
    assert f'allow_class("{module}.TwoLayers")' in (folder / "README.md").read_text()


@pytest.mark.parametrize("command", ["fit", "hpo"])
@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("{class_path: torch.nn.Nope}", "model.head.class_path: expected the path of a class"),
        ("{init_args: {width: 3}}", "model.head.init_args: expected nothing without model.head.class_path"),
        (
            "{class_path: torch.nn.Linear, init_args: {wide: 3}}",
            "model.head.init_args: torch.nn.Linear does not accept",
        ),
    ],
)
def test_a_wrong_head_is_one_line_before_anything_is_written(
    options: list[str], search: list[str], tmp_path: Path, run: Run, command: str, head: str, expected: str
) -> None:
    status, _, err = run(*(search if command == "hpo" else ["fit", *options]), "--model.head", head)
    assert status == 2
    assert expected in err.strip().splitlines()[-1]
    assert not (tmp_path / "study").exists()
