"""`lightning-bge hpo` on a module and a data module of another project."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_bge.cli.class_paths import names_a_class

Run = Callable[..., tuple[int, str, str]]
HERE = "tests.helpers.other_project"
SPACE = {
    "model.init_args.lr": {"low": 0.001, "high": 0.1, "log": True},
    "model.init_args.width": {"choices": [4, 16]},
    "data.init_args.batch_size": {"choices": [5, 8]},
}

EPOCHS = {"trainer.max_epochs": {"choices": [1]}}


def options(**changes: Any) -> dict[str, Any]:
    given = {
        "run_dir": "run",
        "model": {"class_path": f"{HERE}.Net"},
        "data": {"class_path": f"{HERE}.Folds"},
        "trainer": {"max_epochs": 3, "accelerator": "cpu"},
        "hpo": {"n_trials": 8, "space": SPACE, "baseline": False},
    }
    return {**given, **changes}


@pytest.fixture
def search(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `hpo`, or another command, with some options, given as YAML."""
    monkeypatch.chdir(tmp_path)

    def call(given: dict[str, Any], *args: str, command: str = "hpo") -> tuple[int, str, str]:
        Path("my.yaml").write_text(yaml.safe_dump(given))
        return run(command, "-c", "my.yaml", *args)

    return call


def summary(folder: str = "run") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "summary.json").read_text())
    return found


def test_a_resumed_trial_has_the_value_of_one_that_was_never_paused(search: Run) -> None:
    status, out, err = search(options())
    assert status == 0, err
    assert "8 trials, 2 folds, at most 3 epochs each; metric: val_loss" in out
    assert "no refit and no export at the end" in out
    assert "resumes trial" in out
    found = summary()
    assert (found["n_failed"], found["n_trials"], len(found["fold_scores"])) == (0, 8, 2)
    hpo = {"n_trials": 1, "space": SPACE, "enqueue": [found["best_params"]], "pruner": {"name": "none"}}
    status, out, err = search(options(run_dir="one", hpo=hpo))
    assert status == 0, err
    assert summary("one")["fold_scores"] == found["fold_scores"]
    assert "configured hyperparameters, without a search: val_loss" in out


def test_the_same_command_continues_the_study_and_another_one_is_refused(search: Run) -> None:
    assert search(options(hpo={"n_trials": 2, "space": SPACE, "baseline": False}))[0] == 0
    status, out, _ = search(options(hpo={"n_trials": 3, "space": SPACE, "baseline": False}))
    assert status == 0
    assert "[3/3]" in out
    assert "[2/3]" not in out
    status, _, err = search(options(model={"class_path": f"{HERE}.Net", "init_args": {"dropout": 0.3}}))
    assert status == 2
    assert "model.init_args.dropout: 0.1 in the folder, 0.3 requested" in err


def test_best_yaml_holds_the_best_hyperparameters(search: Run) -> None:
    assert search(options(hpo={"n_trials": 2, "space": SPACE, "baseline": False}))[0] == 0
    best = yaml.safe_load(Path("run/best.yaml").read_text())
    assert {f"{part}.init_args.{name}" for part in ("model", "data") for name in best[part]["init_args"]} >= set(SPACE)
    for name, value in summary()["best_params"].items():
        part, _, last = name.split(".")
        assert best[part]["init_args"][last] == value
    assert "hpo" not in best


def test_a_single_split_and_optimizers_of_the_options(search: Run) -> None:
    given = options(
        model={"class_path": f"{HERE}.Plain"},
        data={"class_path": f"{HERE}.Split"},
        optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}},
        monitor={"metric": "val_loss", "mode": "min", "objective": "last"},
        hpo={
            "n_trials": 2,
            "space": {"model.init_args.width": {"choices": [4, 16]}},
            "seed_replicates": 1,
            "baseline": False,
        },
    )
    status, out, err = search(given)
    assert status == 0, err
    assert "a single split" in out
    assert "with seed 43" in out


def test_objects_in_a_checkpoint_need_an_option(search: Run) -> None:
    given = options(model={"class_path": f"{HERE}.Objects"})
    status, _, err = search(given)
    assert status == 2
    assert "hpo.weights_only: the checkpoint " in err.splitlines()[-1]
    assert "such as torch.nn.modules.loss.MSELoss. Set hpo.weights_only to false" in err.splitlines()[-1]
    status, _, err = search(given, "--hpo.weights_only", "false")
    assert status == 0, err
    assert summary()["n_failed"] == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (options(model={"class_path": "nope.Net"}), "model: class_path nope.Net: No module named 'nope'"),
        (options(model={"class_path": f"{HERE}.Net", "init_args": {"depth": 3}}), "Option 'depth' is not accepted"),
        (
            options(model={"class_path": f"{HERE}.Refusing"}),
            f"class_path {HERE}.Refusing: width is deprecated, use depth instead",
        ),
        (options(monitor={"metric": "f1"}), "monitor.mode: expected max or min for the metric f1, got null"),
        (options(monitor={"metric": "loss"}), "the metric 'loss' is not logged in validation; logged are: val_loss"),
        (options(data={"class_path": f"{HERE}.NoSelection"}), "NoSelection has num_folds=2, and no method select_fold"),
        (
            options(data={"class_path": f"{HERE}.WrongNumber"}, hpo={"space": EPOCHS}),
            "num_folds of WrongNumber to be a number, 1 or more, got 'two'",
        ),
        (
            options(hpo={"space": {"model.init_args.nope": {"choices": [1, 2]}}}),
            "class_path tests.helpers.other_project.Net: Option 'nope' is not accepted",
        ),
        (options(hpo={"space": SPACE, "ensemble": True}), "hpo.ensemble: expected false for a module of another"),
        (options(hpo={"space": SPACE, "outer_folds": 2}), "hpo.outer_folds: expected null for a module of another"),
        (
            options(hpo={"space": SPACE, "cost": "predict_seconds", "pruner": {"name": "none"}}),
            "hpo.cost: expected train_seconds or null",
        ),
        (
            options(hpo={"space": SPACE, "val_check_interval": 0.5}),
            "hpo.val_check_interval: expected 1 for a module of another project, got 0.5",
        ),
        (options(trainer={"max_epochs": -1}), "trainer.max_epochs: a study needs 1 or more, got -1"),
    ],
)
def test_what_is_wrong_is_one_message(search: Run, given: dict[str, Any], message: str) -> None:
    status, _, err = search(given)
    assert status == 2, err
    [line] = [line for line in err.splitlines() if line.startswith("lightning-bge: ")]
    assert message in line
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], False),
        (["--model.name_or_path", "x"], False),
        (["--model", "my.Net"], True),
        (["--model=my.Net"], True),
        (["--data.class_path", "my.Data"], True),
        (["--model", '{"name_or_path": "x"}'], False),
    ],
)
def test_a_class_is_named_by_its_path(args: list[str], expected: bool) -> None:
    assert names_a_class(args) == expected


def test_a_yaml_file_may_name_it(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for text, expected in (
        ("model: {name_or_path: x}", False),
        ("model: {class_path: my.Net}", True),
        ("data: {class_path: my.Data}", True),
        ("model: my.Net", True),
        ("- 1", False),
    ):
        path.write_text(text)
        assert names_a_class(["-c", str(path)]) == expected


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_an_audit(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    pytest.importorskip(package, reason="newer versions of lightning bring it")
    monkeypatch.chdir(tmp_path)
    name = f"{HERE}.Net" if package == "lightning.pytorch" else f"{package}.demos.boring_classes.BoringModel"
    data = ["--data", f"{HERE}.Split"] if package == "lightning.pytorch" else []
    args = ["--model", name, *data, "--trainer.accelerator", "cpu", "--run_dir", "run", "--rounds", "0"]
    status, out, err = run("audit", *args)
    assert status == 0, err
    rows = {row["name"] for row in json.loads(Path("run/audit.json").read_text())["rows"]}
    assert len(rows) > 10
    assert "audit.html" in out


@pytest.mark.parametrize("command", ["plan", "audit"])
def test_the_json_is_checked_before_anything_is_measured(
    search: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("tests.helpers.other_project.Net.training_step", lambda *_: pytest.fail("it was trained"))
    Path("folder").mkdir()
    status, _, err = search(options(), "--json", "folder", command=command)
    assert status == 2
    assert "json: expected a file, got the folder 'folder'" in err


@pytest.mark.parametrize("command", ["fit", "hpo", "audit"])
def test_the_run_folder_is_checked_first(search: Run, command: str) -> None:
    Path("run").touch()
    given = options()
    if command != "hpo":
        del given["hpo"]
    status, _, err = search(given, command=command)
    assert status == 2
    assert "run is a file, where a folder is needed" in err


@pytest.mark.parametrize("command", ["hpo", "plan"])
def test_a_study_of_parts_of_the_data_is_refused(search: Run, command: str) -> None:
    status, _, err = search(options(), "--trainer.fast_dev_run", "true", command=command)
    assert status == 2
    assert "trainer.fast_dev_run: a study needs whole epochs" in err


def test_a_module_of_the_package_pytorch_lightning(search: Run) -> None:
    pytest.importorskip("pytorch_lightning", reason="newer versions of lightning bring it")
    given = {
        "model": {"class_path": "pytorch_lightning.demos.boring_classes.BoringModel"},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "limit_train_batches": 4, "limit_val_batches": 2},
        "monitor": {"metric": "x", "mode": "min"},
        "hpo": {"n_trials": 2, "space": {"trainer.max_epochs": {"choices": [1, 2]}}, "baseline": False},
    }
    status, _, err = search({"run_dir": "run", **given})
    assert status == 2
    assert "the metric 'x' is not logged in validation; logged are: none" in err.splitlines()[-1]


@pytest.fixture
def fit(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs `fit` with some options, given as YAML."""
    monkeypatch.chdir(tmp_path)

    def call(folder: str, epochs: int, *args: str) -> tuple[int, str, str]:
        given = {name: value for name, value in options().items() if name != "hpo"}
        given |= {"run_dir": folder, "trainer": {"max_epochs": epochs, "accelerator": "cpu"}}
        Path("my.yaml").write_text(yaml.safe_dump(given))
        return run("fit", "-c", "my.yaml", *args)

    return call


def test_a_fit_that_goes_on_is_one_that_was_never_interrupted(fit: Run) -> None:
    assert fit("whole", 3)[0] == 0
    assert fit("parts", 2)[0] == 0
    status, out, err = fit("parts", 2)
    assert status == 0
    assert "parts is finished" in out
    status, out, err = fit("parts", 3)
    assert status == 0, err
    assert "going on from 2 to 3 epochs" in out
    assert "resuming from parts/checkpoints/last.ckpt" in out
    whole, parts = summary("whole"), summary("parts")
    assert parts["last"] == whole["last"]
    assert (parts["value"], parts["epochs"], parts["metric"]) == (whole["value"], 3, "val_loss")
    assert Path(parts["checkpoint"]).is_file()
    page = Path("parts/report.html").read_text()
    assert "val_loss" in page
    status, _, err = fit("parts", 3, "--model.init_args.dropout", "0.5")
    assert status == 2
    assert "model.init_args.dropout: 0.1 in the folder, 0.5 requested" in err


def test_a_dry_run_of_fit_writes_nothing(fit: Run) -> None:
    status, out, err = fit("run", 2, "--trainer.fast_dev_run", "true")
    assert status == 0, err
    assert "dry run (trainer.fast_dev_run=" in out
    assert not Path("run").exists()


def test_a_metric_that_fit_does_not_find_is_one_message(fit: Run) -> None:
    status, _, err = fit("run", 1, "--monitor.metric", "f1", "--monitor.mode", "max")
    assert status == 2
    assert "f1" in err.splitlines()[-1]


@pytest.mark.parametrize("command", ["predict", "validate", "test"])
def test_the_other_commands_have_our_classes_alone(run: Run, command: str) -> None:
    status, _, err = run(command, "--model", f"{HERE}.Net")
    assert status == 2
    assert f"expected none for lightning-bge {command}" in err
    assert "hpo, fit, plan and audit take other classes" in err
