"""Studies with their runs in MLflow, W&B (offline) and TensorBoard, read back with the trackers' own readers.

MLflow needs another pyarrow than the other tests, so that `make test-slow` makes an environment for it beside the one
of the tests, which it sees as well.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState

from tests.helpers import cli_processes
from tests.helpers.cli_sample import write_sample_with_model
from tests.helpers.paths import ROOT
from tests.helpers.tracked_study import FATES

PYTHON = Path(os.environ.get("LIGHTNING_BGE_MLFLOW_ENV", f"{sys.prefix}-mlflow")) / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"{PYTHON} is made by `make test-slow`"),
]
SECRET = "planted0" * 5  # a key of W&B has 40 characters
TRACKERS = ("mlflow", "wandb", "tensorboard")
# how each fate ends: the first attempt, and whether a second one completes it
ENDS = {
    "complete": ("complete", False),
    "pruned": ("pruned", False),
    "paused": ("paused", False),
    "failed": ("failed", False),
    "killed in training": ("killed", True),
    "interrupted": ("killed", True),
    "killed before its run": ("killed", True),
}
WELL, BADLY = ("complete", "pruned", "paused"), ("failed", "killed")
STATUS = {
    "mlflow": dict.fromkeys(WELL, "FINISHED") | {"failed": "FAILED", "killed": "KILLED"},
    "wandb": dict.fromkeys(WELL, "finished") | {"failed": "failed", "killed": "killed"},
    "tensorboard": dict.fromkeys(WELL, "SUCCESS") | dict.fromkeys(BADLY, "FAILURE"),
}


def environment() -> dict[str, str]:
    """With a folder as MLflow's store, W&B offline, and passwords that no file may hold."""
    secrets = dict.fromkeys(("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"), SECRET)
    options = {"MLFLOW_ALLOW_FILE_STORE": "true", "WANDB_MODE": "offline", "MLFLOW_TRACKING_USERNAME": "me"}
    options |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}  # one that is refused is not repeated
    return {**os.environ, **secrets, **options, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a module in the environment with all trackers."""
    return subprocess.run(
        [str(PYTHON), "-m", *arguments], cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )


def runs(tracker: str, place: object, folder: Path) -> list[dict[str, Any]]:
    """The runs in a tracker, by their names."""
    done = python("tests.helpers.tracker_runs", tracker, str(place), folder=folder)
    assert done.returncode == 0, done.stderr
    return sorted(json.loads(done.stdout.splitlines()[-1]), key=lambda run: run["name"])


def all_runs(folder: Path, store: object) -> dict[str, list[dict[str, Any]]]:
    """Those of all trackers of a study in `folder/run`."""
    places = {"mlflow": store, "wandb": folder / "run" / "wandb", "tensorboard": folder / "run" / "tensorboard"}
    return {tracker: runs(tracker, places[tracker], folder) for tracker in TRACKERS}


def state_of(run: dict[str, Any]) -> str | None:
    """The state of a trial's run; None: it is the run of a study."""
    found: str | None = run["tags"].get("state") or run["values"].get("state")
    return found


def files_with(secret: str, folder: Path) -> list[Path]:
    """The files that hold a text."""
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


# ---------------------------------------------------------------------- trials that end in every way

Ended = tuple[Path, list[FrozenTrial], dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A study whose process was killed twice: its folder, trials, and runs."""
    folder = tmp_path_factory.mktemp("ended")
    study(folder, deaths=2)
    return folder, cli_processes.trials(folder / "run", "run"), all_runs(folder, folder / "store")


def study(folder: Path, deaths: int) -> None:
    """Run what is left of the study until it ends; its process is killed so many times."""
    trackers = json.dumps([{"name": "mlflow", "tracking_uri": str(folder / "store")}, "wandb", "tensorboard"])
    done = [python("tests.helpers.tracked_study", str(folder / "run"), trackers, folder=folder) for _ in range(deaths)]
    assert [one.returncode for one in done] == [-signal.SIGKILL] * deaths
    last = python("tests.helpers.tracked_study", str(folder / "run"), trackers, folder=folder)
    assert last.returncode == 0, last.stdout + last.stderr
    assert "hpo.trackers" not in last.stdout + last.stderr


def expected_states() -> list[str]:
    """The states of the trials, in their order: one that is to be continued is continued at once."""
    return [state for fate in FATES.values() for state in (ENDS[fate][0], *["complete"] * ENDS[fate][1])]


@pytest.mark.parametrize("tracker", TRACKERS)
def test_there_is_one_run_for_each_trial_with_the_right_state(ended: Ended, tracker: str) -> None:
    _, trials, found = ended
    of_trials = [run for run in found[tracker] if state_of(run) is not None]
    assert len(of_trials) == len(trials) == 10
    assert len({run["id"] for run in of_trials}) == 10
    assert [state_of(run) for run in of_trials] == expected_states()
    assert [run["status"] for run in of_trials] == [STATUS[tracker][state] for state in expected_states()]
    assert [int(run["tags"]["trial"]) for run in of_trials] == [trial.number for trial in trials]
    assert [float(run["params"]["x"]) for run in of_trials] == pytest.approx([trial.params["x"] for trial in trials])


@pytest.mark.parametrize("tracker", TRACKERS)
def test_curves_and_values_are_those_of_the_trials(ended: Ended, tracker: str) -> None:
    _, trials, found = ended
    of_trials = [run for run in found[tracker] if state_of(run) is not None]
    for run, trial in zip(of_trials, trials, strict=True):
        assert [tuple(point) for point in run["points"].get("f1", [])] == list(trial.intermediate_values.items())
        folds = trial.user_attrs.get("curve", ())  # a killed process has not written it
        for k, fold in enumerate(folds):
            assert run["points"][f"fold_{k}/f1"] == [[report[0], report[1]] for report in fold]
            losses = [value for _, value in run["points"][f"fold_{k}/loss"]]
            assert losses == pytest.approx([report[6] for report in fold])
        assert run["values"].get("value") == (trial.value if trial.state == TrialState.COMPLETE else None)


@pytest.mark.parametrize("tracker", TRACKERS)
def test_attempts_at_one_parameter_set_are_linked(ended: Ended, tracker: str) -> None:
    _, trials, found = ended
    of_trials = [run for run in found[tracker] if state_of(run) is not None]
    for run, trial in zip(of_trials, trials, strict=True):
        known = trial.user_attrs
        assert int(run["tags"]["parameter_set"]) == known.get("parameter_set", trial.number)
        assert run["tags"].get("retry_of") == (str(known["retry_of"]) if "retry_of" in known else None)
    assert sum("retry_of" in run["tags"] for run in of_trials) == 3


def test_the_study_has_a_run_with_the_report(ended: Ended) -> None:
    _, _, found = ended
    [parent] = [run for run in found["mlflow"] if state_of(run) is None]
    assert (parent["name"], parent["status"], parent["files"]) == ("run", "FINISHED", ["report.html"])
    assert parent["values"]["best_value"] == 0.5
    nested = [run for run in found["mlflow"] if run is not parent]
    assert {run["tags"]["mlflow.parentRunId"] for run in nested} == {parent["id"]}
    [of_study] = [run for run in found["wandb"] if state_of(run) is None]
    assert (of_study["name"], of_study["status"], of_study["values"]["best_value"]) == ("run", "finished", 0.5)
    assert "report.html" in of_study["files"]
    assert {run["group"] for run in found["wandb"]} == {of_study["group"]}


def test_the_same_call_again_changes_no_run(ended: Ended) -> None:
    folder, _, found = ended
    study(folder, deaths=0)
    again = all_runs(folder, folder / "store")
    for tracker in TRACKERS:
        assert [run["id"] for run in again[tracker]] == [run["id"] for run in found[tracker]]
        assert [run["points"] for run in again[tracker] if state_of(run)] == [
            run["points"] for run in found[tracker] if state_of(run)
        ]


def test_no_file_holds_a_password(ended: Ended) -> None:
    folder, _, _ = ended
    assert files_with("parameter_set", folder)  # what is looked for is found
    assert files_with(SECRET, folder) == []


def test_a_server_that_is_away_stops_nothing_and_the_runs_can_be_made_up_for(tmp_path: Path) -> None:
    def run(uri: str) -> str:
        tracker = json.dumps([{"name": "mlflow", "tracking_uri": uri}])
        done = python("tests.helpers.tracked_study", str(tmp_path / "run"), tracker, "3", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stderr

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        warning, last = [line for line in run(address).splitlines() if line.startswith("hpo.trackers")]
    assert "mlflow can't be written to" in warning
    assert "the runs in mlflow are not complete" in last
    assert "Run the same `lightning-bge hpo` again" in last
    trials = cli_processes.trials(tmp_path / "run", "run")
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "PRUNED"]
    assert "hpo.trackers" not in run(str(tmp_path / "store"))
    found = [one for one in runs("mlflow", tmp_path / "store", tmp_path) if state_of(one) is not None]
    assert [state_of(one) for one in found] == ["complete", "pruned", "paused"]
    assert [dict(one["points"]["f1"]) for one in found] == [trial.intermediate_values for trial in trials]


# ---------------------------------------------------------------------- the whole program


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """A search with two workers, one of which is killed while it trains, and the lines that it has printed."""
    folder = write_sample_with_model(tmp_path_factory.mktemp("searched"))
    options = {
        "model.name_or_path": "model",
        "data.train_file": "train.csv",
        "data.text_columns": "[text, criterion]",
        "data.group_column": "post_id",
        "data.split.folds": "2",
        "trainer.max_epochs": "2",
        "trainer.precision": "32-true",
        "run_dir": "run",
        "hpo.n_trials": "5",
        "hpo.workers": "2",
        "hpo.seed_replicates": "1",
        "hpo.space": "{model.optimizer.lr: {low: 1.0e-4, high: 1.0e-2, log: true}}",
        "hpo.trackers": "[{name: mlflow, tracking_uri: 'sqlite:///mlflow.db'}, wandb, tensorboard]",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    process = subprocess.Popen(
        [str(PYTHON), "-m", "lightning_bge.cli", "hpo", *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        cli_processes.wait_for(lambda: bool(cli_processes.running(folder / "run", "run")), process)
        os.kill(next(iter(cli_processes.running(folder / "run", "run"))), signal.SIGKILL)
        killed = time.monotonic()
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
        assert time.monotonic() - killed > 1, out
        yield folder, out.splitlines()
    finally:
        cli_processes.stop([process])


def test_a_search_with_a_killed_worker_has_all_its_runs(searched: tuple[Path, list[str]]) -> None:
    folder, lines = searched
    assert not [line for line in lines if "hpo.trackers" in line]
    names = ("run", "run-seed-replicates", "run-baseline")
    trials = [trial for name in names for trial in cli_processes.trials(folder / "run", name)]
    assert sum(trial.state == TrialState.FAIL for trial in trials) == 1
    kinds = Counter(run["tags"]["kind"] for run in runs("mlflow", f"sqlite:///{folder}/mlflow.db", folder))
    found = all_runs(folder, f"sqlite:///{folder}/mlflow.db")
    expected = Counter(trial.state.name for trial in trials)
    for tracker in TRACKERS:
        of_trials = [run for run in found[tracker] if state_of(run) is not None]
        assert len(of_trials) == len({run["id"] for run in of_trials}) == len(trials)
        states = Counter(state_of(run) for run in of_trials)
        assert states["complete"] == expected["COMPLETE"]
        assert states["killed"] == expected["FAIL"] == 1
        assert states["paused"] + states["pruned"] == expected["PRUNED"]
    assert kinds["trial"] == len(cli_processes.trials(folder / "run", "run"))
    assert (kinds["study"], kinds["baseline"]) == (1, 1)
    assert kinds["seed replicate"] == len(cli_processes.trials(folder / "run", "run-seed-replicates")) > 0


def test_the_report_is_attached_and_no_file_holds_a_password(searched: tuple[Path, list[str]]) -> None:
    folder, _ = searched
    found = all_runs(folder, f"sqlite:///{folder}/mlflow.db")
    [parent] = [run for run in found["mlflow"] if run["tags"]["kind"] == "study"]
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert (parent["status"], parent["files"]) == ("FINISHED", ["report.html"])
    assert parent["values"]["best_value"] == summary["best_value"]
    assert files_with(SECRET, folder) == []


def test_a_uri_that_mlflow_can_never_use_is_refused(tmp_path: Path) -> None:
    code = "from lightning_bge.hpo.trackers.config import check_trackers as c\n"
    code += "c([{'name': 'mlflow', 'tracking_uri': 'localhost:5000'}])"
    done = subprocess.run([str(PYTHON), "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    expected = (
        "mlflow does not accept localhost:5000: .*unsupported URI.* Set tracking_uri to sqlite:///mlflow.db or to"
    )
    assert re.search(expected, done.stderr.splitlines()[-1]), done.stderr
    assert not list(tmp_path.iterdir())
