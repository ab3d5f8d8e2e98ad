"""The program in processes that are stopped, killed, and several at once on one run folder."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from optuna.trial import TrialState
from safetensors.torch import load_file

from lightning_bge.hpo.storage.workers import FolderWorkers
from tests.helpers.cli_processes import running, start, stop, trials, wait_for

pytestmark = pytest.mark.slow  # minutes, as each test starts several processes

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_study_loses_no_finished_trial_and_leaves_none_running(
    search: list[str], tmp_path: Path, kill: signal.Signals
) -> None:
    study = tmp_path / "study"
    search = [*search, "--hpo.n_trials", "5", "--trainer.max_epochs", "20", "--hpo.pruner.name", "none"]
    process = start(search)
    journal = study / "journal.log"
    wait_for(lambda: journal.exists() and journal.read_text().count('"state":1') >= 1 and running(study), process)
    process.send_signal(kill)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == (130 if kill == signal.SIGINT else -kill), out
    done = [(t.number, t.value, t.datetime_complete) for t in trials(study) if t.state == TrialState.COMPLETE]
    assert done
    again = start([*search, "--hpo.refit", "false"])
    out = again.communicate(timeout=240)[0]
    assert again.returncode == 0, out
    after = trials(study)
    states = [t.state for t in after]
    assert TrialState.RUNNING not in states
    assert TrialState.WAITING not in states
    assert states.count(TrialState.COMPLETE) == 5
    assert [(t.number, t.value, t.datetime_complete) for t in after if t.number < len(done)] == done
    points = [tuple(t.params.values()) for t in after if t.state == TrialState.COMPLETE]
    assert len(set(points)) == 5  # none is repeated
    [killed] = [t for t in after if t.state == TrialState.FAIL]
    assert ("interrupted" if kill == signal.SIGINT else "worker_lost") in killed.user_attrs
    [continued] = [t for t in after if t.user_attrs.get("retry_of") == killed.number]
    assert (continued.state, continued.params) == (TrialState.COMPLETE, killed.params)
    if kill == signal.SIGINT:  # it was saved where it was
        assert continued.user_attrs["reports_before"] == len(killed.intermediate_values)


@pytest.fixture
def held(search: list[str], tmp_path: Path) -> list[str]:
    """A search of four trials, each of which waits for the file `go` before it trains."""
    wait = f"[{{class_path: tests.helpers.wait_for_file.WaitForFile, init_args: {{path: {tmp_path / 'go'}}}}}]"
    return [*search, "--hpo.n_trials", "4", "--hpo.pruner.name", "none", "--trainer.callbacks", wait]


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_the_trial_that_runs_and_ends_the_process_with_its_own_status(
    held: list[str], tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    process = start(held)
    wait_for(lambda: bool(running(tmp_path / "study")), process)
    process.send_signal(sent)
    (tmp_path / "go").touch()
    out = process.communicate(timeout=120)[0]
    assert process.returncode == status, out
    assert f"{sent.name}: saving what is being trained" in out
    [stopped] = trials(tmp_path / "study")
    assert (stopped.state, stopped.user_attrs["interrupted"]) == (TrialState.FAIL, sent.name)
    assert (tmp_path / "study" / "checkpoints" / "0" / "state.pt").is_file()


def test_a_signal_stops_a_process_that_waits_for_the_one_that_ends_the_study(search: list[str], tmp_path: Path) -> None:
    study = tmp_path / "study"
    study.mkdir()
    options = ["--hpo.n_trials", "1", "--hpo.pruner.name", "none", "--hpo.baseline", "false"]
    with FileLock(study / "end.lock"):  # as the one that refits has it
        process = start([*search, *options])
        try:
            wait_for(lambda: (study / "oof").is_dir() and not running(study), process)
            time.sleep(1.0)
            process.send_signal(signal.SIGTERM)
            out = process.communicate(timeout=60)[0]
        finally:
            stop([process])
    assert process.returncode == 143, out
    assert not (study / "summary.json").exists()


def test_a_second_ctrl_c_stops_at_once(held: list[str], tmp_path: Path) -> None:
    process = start(held)
    try:
        wait_for((tmp_path / "go.waiting").exists, process)  # a trial that is not begun yet is left as it is
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert any("Ctrl-C once more stops at once" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        out = process.communicate(timeout=60)[0]  # no trial was allowed to begin its training
    finally:
        stop([process])
    assert process.returncode == 130, out
    assert "the same command continues" in out
    [stopped] = trials(tmp_path / "study")
    assert (stopped.state, stopped.user_attrs["interrupted"]) == (TrialState.FAIL, "KeyboardInterrupt")


def test_several_workers_of_one_command_share_a_study(held: list[str], tmp_path: Path) -> None:
    study, process = tmp_path / "study", start([*held, "--hpo.workers", "2", "--hpo.seed_replicates", "1"])
    try:
        wait_for(lambda: len(running(study)) == 2, process)
        assert process.pid not in running(study)
        (tmp_path / "go").touch()
        out = process.communicate(timeout=240)[0]
    finally:
        stop([process])
    assert process.returncode == 0, out
    assert [trial.state for trial in trials(study)] == [TrialState.COMPLETE] * 4
    assert len({trial.user_attrs["worker"]["pid"] for trial in trials(study)}) == 2
    shown = (
        "2 workers; what each prints is in",
        "[4/4] trial",
        "with seed 43 done: ",
        "f1 of the winner",
        "report.html",
    )
    for words in shown:
        assert words in out
    assert sorted(path.name for path in (study / "workers").glob("*.log")) == ["worker-0.log", "worker-1.log"]
    assert json.loads((study / "summary.json").read_text())["n_complete"] == 4


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_the_workers_of_a_command_save_their_trials_and_end_when_it_ends(
    held: list[str], tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    study, process = tmp_path / "study", start([*held, "--hpo.workers", "2"])
    try:
        wait_for(lambda: len(running(study)) == 2, process)
        process.send_signal(sent)
        (tmp_path / "go").touch()
        out = process.communicate(timeout=120)[0]
        assert process.returncode == status, out
        until = time.monotonic() + 120
        while FolderWorkers(study).living():
            assert time.monotonic() < until, "workers are left"
            time.sleep(0.1)
    finally:
        stop([process])
    # one with a trial that had ended before the request came begins no other
    stopped = [trial for trial in trials(study) if trial.state == TrialState.FAIL]
    assert {trial.state for trial in trials(study)} <= {TrialState.FAIL, TrialState.COMPLETE}
    assert [trial.user_attrs["interrupted"] for trial in stopped] == ["SIGTERM"] * len(stopped)
    assert not (study / "summary.json").exists()


def let_go(processes: list[subprocess.Popen[str]], folder: Path) -> list[str]:
    """Let the held processes of a folder run to their end, which is a success; returns what they print."""
    (folder / "go").touch()
    outs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outs
    return outs


def test_two_processes_at_once_on_one_run_folder_end_with_one_summary(held: list[str], tmp_path: Path) -> None:
    study, processes = tmp_path / "study", []
    try:
        for number in (1, 2):
            processes.append(start(held))
            wait_for(lambda number=number: len(running(study)) == number, processes[-1])
        assert running(study) == {process.pid for process in processes}
        outs = let_go(processes, tmp_path)
    finally:
        stop(processes)
    done = trials(study)
    assert [trial.state for trial in done] == [TrialState.COMPLETE] * 4
    assert len({trial.params["model.optimizer.lr"] for trial in done}) == 4
    summary = json.loads((study / "summary.json").read_text())
    assert (summary["n_trials"], summary["n_complete"], summary["n_failed"]) == (4, 4, 0)
    assert all(f"selected   {summary['best_value']:.4f}" in out for out in outs)
    assert len(json.loads((study / "run.json").read_text())["calls"]) == 2
    assert FolderWorkers(study).living() == set()


def test_a_worker_joins_a_study_from_another_folder_although_the_paths_in_it_are_relative(
    held: list[str], tmp_path: Path, sample: Path
) -> None:
    study, elsewhere, processes = tmp_path / "study", tmp_path / "elsewhere", []
    elsewhere.mkdir()
    for name in ("model", "train.csv"):
        (tmp_path / name).symlink_to(sample / name)
    relative = {"--run_dir": "study", "--model.name_or_path": "model", "--data.train_file": "train.csv"}
    try:
        processes.append(start([*held, *(word for option in relative.items() for word in option)], tmp_path))
        wait_for(lambda: len(running(study)) == 1, processes[0])
        processes.append(start(["worker", "../study"], elsewhere))
        wait_for(lambda: len(running(study)) == 2, processes[1])
        assert running(study) == {process.pid for process in processes}
        let_go(processes, tmp_path)
    finally:
        stop(processes)
    assert [trial.state for trial in trials(study)] == [TrialState.COMPLETE] * 4
    assert (study / "summary.json").is_file()
    assert list(elsewhere.iterdir()) == []
    assert yaml.safe_load((study / "config.yaml").read_text())["model"]["name_or_path"] == "model"


def test_a_worker_needs_a_study_that_was_started(run: Run, tmp_path: Path) -> None:
    status, _, err = run("worker", str(tmp_path))
    assert status == 2
    assert "expected the run folder of a study that `lightning-bge hpo` has started" in err


def test_a_killed_fit_goes_on_and_ends_with_the_same_weights(options: list[str], run: Run, tmp_path: Path) -> None:
    quiet = ("--trainer.enable_progress_bar", "false", "--model.optimizer.lr", "1e-3", "--trainer.max_epochs", "12")
    args = ["fit", *options, *quiet]
    status, _, err = run(*args, "--run_dir", str(tmp_path / "whole"))
    assert status == 0, err
    process = start([*args, "--run_dir", str(tmp_path / "killed")])
    wait_for((tmp_path / "killed" / "checkpoints" / "last.ckpt").exists, process)
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "killed" / "summary.json").exists()
    status, out, err = run(*args, "--run_dir", str(tmp_path / "killed"))
    assert status == 0, err
    assert "resuming from" in out
    whole, killed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    # a finished run is not trained again; one of other settings is refused
    status, out, _ = run(*args, "--run_dir", str(tmp_path / "killed"))
    assert "is finished" in out
    status, _, err = run(*args, "--run_dir", str(tmp_path / "killed"), "--model.optimizer.lr", "2e-3")
    assert status == 2
    assert "model.optimizer.lr: 0.001 in the folder, 0.002 requested" in err
