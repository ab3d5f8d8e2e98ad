"""Loss, optimizer and schedule by the path of their class, from the command line to the files of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

Run = Callable[..., tuple[int, str, str]]
SGD = "{class_path: torch.optim.SGD, init_args: {lr: 1e-2}}"
CYCLE = "{class_path: torch.optim.lr_scheduler.OneCycleLR, init_args: {pct_start: 0.5}}"
SOFT = "{class_path: torch.nn.SoftMarginLoss, signed_labels: true}"


def test_a_run_of_classes_is_written_read_and_continued(options: list[str], tmp_path: Path, run: Run) -> None:
    (tmp_path / "fit.yaml").write_text(f"model: {{optimizer: {SGD}, schedule: {CYCLE}}}\n")
    command = ["fit", "-c", str(tmp_path / "fit.yaml"), *options, "--model.loss", SOFT]
    status, _, err = run(*command)
    assert status == 0, err
    folder = tmp_path / "study"
    model = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    assert model["optimizer"]["init_args"] == {"lr": 0.01}
    assert model["schedule"]["class_path"] == "torch.optim.lr_scheduler.OneCycleLR"
    assert (model["loss"]["class_path"], model["loss"]["signed_labels"]) == ("torch.nn.SoftMarginLoss", True)
    [checkpoint] = (folder / "checkpoints").glob("last*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    assert content["hyper_parameters"]["optimizer"]["class_path"] == "torch.optim.SGD"
    status, out, err = run("fit", "-c", str(folder / "config.yaml"))
    assert (status, "is finished" in out) == (0, True), err
    status, _, err = run(*command, "--model.optimizer.init_args.lr", "0.02")
    assert status == 2
    assert "model.optimizer.init_args.lr" in err
    status, _, err = run(*command, "--trainer.max_epochs", "3")
    assert status == 2
    assert "has a schedule by its class" in err


def test_arguments_of_classes_are_searched(options: list[str], tmp_path: Path, run: Run) -> None:
    space = {
        "model.optimizer.class_path": {"choices": ["torch.optim.SGD", "torch.optim.RMSprop"]},
        "model.optimizer.init_args.lr": {"low": 1e-3, "high": 1e-1, "log": True},
        "model.optimizer.init_args.nesterov": {
            "choices": [False],
            "when": {"model.optimizer.class_path": "torch.optim.SGD"},
        },
    }
    command = ["hpo", *options, "--data.split.folds", "2", "--hpo.n_trials", "3", "--model.optimizer", SGD]
    search = ["--hpo.space", json.dumps(space), "--hpo.sampler.name", "random"]
    status, _, err = run(*command, *search)
    assert status == 0, err
    best = yaml.safe_load((tmp_path / "study" / "best.yaml").read_text())["model"]["optimizer"]
    winner = json.loads((tmp_path / "study" / "summary.json").read_text())
    assert best["init_args"]["lr"] == pytest.approx(winner["best_params"]["model.optimizer.init_args.lr"])
    assert best["class_path"] == winner["best_params"]["model.optimizer.class_path"]
    assert ("nesterov" in best["init_args"]) == (best["class_path"] == "torch.optim.SGD")
    status, _, err = run(*command, *search, "--model.loss.class_path", "torch.nn.HuberLoss", "--hpo.n_trials", "4")
    assert status == 2
    assert "model.loss.class_path" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--model.loss.class_path", "torch.nn.Nope"), "model.loss.class_path: expected the path of a class"),
        (("--model.loss", "{class_path: torch.nn.SoftMarginLoss}"), "set model.loss.signed_labels to true"),
        (("--model.loss", "{class_path: torch.nn.HuberLoss, init_args: {reduction: mean}}"), "reduction to none"),
        (("--model.optimizer.class_path", "torch.optim.SGD"), "model.optimizer.init_args.lr: expected the learning"),
        (("--model.optimizer", SGD, "--model.optimizer.lr", "0.1"), "model.optimizer.lr: has no effect beside"),
        (("--model.schedule.class_path", "torch.optim.lr_scheduler.ReduceLROnPlateau"), "needs the value of a metric"),
        (("--model.schedule", "{class_path: torch.optim.lr_scheduler.StepLR}"), "does not accept {}"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "hpo"])
def test_a_wrong_class_is_one_line_before_anything_is_written(
    options: list[str],
    search: list[str],
    tmp_path: Path,
    run: Run,
    command: str,
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    status, _, err = run(*(search if command == "hpo" else ["fit", *options]), *arguments)
    assert status == 2
    assert expected in err.strip().splitlines()[-1]
    assert not (tmp_path / "study").exists()


def test_a_wrong_choice_of_a_search_is_found_before_the_first_trial(
    options: list[str], tmp_path: Path, run: Run
) -> None:
    space = json.dumps({"model.loss.class_path": {"choices": ["torch.nn.HuberLoss", "torch.nn.BCELoss"]}})
    status, _, err = run("hpo", *options, "--data.split.folds", "2", "--hpo.n_trials", "2", "--hpo.space", space)
    assert status == 2
    assert "torch.nn.BCELoss takes probabilities" in err.strip().splitlines()[-1]
    assert not (tmp_path / "study" / "journal.log").exists()
