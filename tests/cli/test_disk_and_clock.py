"""A search whose disk fills up or can't be written, whose clock jumps, and which is started with other options."""

from __future__ import annotations

import datetime as real
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from lightning_bge.hpo.analysis.journal import load_study
from tests.helpers.cli_processes import start, stop, trials

pytestmark = pytest.mark.slow
KIB = 1024
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a file system can't be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def on(folder: Path, search: list[str]) -> list[str]:
    """The command with its run folder elsewhere."""
    arguments = list(search)
    arguments[arguments.index("--run_dir") + 1] = str(folder / "study")
    return arguments


def finished(folder: Path) -> dict[int, Any]:
    """The trials that have ended, with their values."""
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    loaded = load_study(folder / "study")
    found = [] if loaded is None else loaded[0].trials
    return {trial.number: (trial.params, trial.values) for trial in found if trial.state in ended}


def best_of(folder: Path) -> Any:
    summary = json.loads((folder / "study" / "summary.json").read_text())
    return summary["best_value"], summary["best_params"]


@pytest.mark.parametrize("free", [4 * KIB, 40 * KIB, 120 * KIB, 400 * KIB])
def test_a_disk_that_fills_up_ends_the_command_with_one_message_and_loses_no_trial(
    run: Run, search: list[str], disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    # it fills up after the check of the room, by another program
    monkeypatch.setattr("lightning_bge.preflight._check_room", lambda *args: 2**40)
    command = [*on(disk, search), "--hpo.n_trials", "6"]
    available = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "other").write_bytes(b"x" * (available - free))
    status, _, err = run(*command)
    assert status == 2, err
    assert len(re.findall("no space left on the disk", err)) == 1
    assert "Traceback" not in err
    before = finished(disk)
    (disk / "other").unlink()
    status, _, err = run(*command)
    assert status == 0, err
    assert before.items() <= finished(disk).items()
    assert run(*on(tmp_path, search), "--hpo.n_trials", "6")[0] == 0
    assert best_of(disk) == best_of(tmp_path)


def test_a_folder_that_cannot_be_written_is_named_and_can_be_read(run: Run, search: list[str], disk: Path) -> None:
    command = [*on(disk, search), "--hpo.pruner.name", "none"]
    assert run(*command, "--hpo.n_trials", "1")[0] == 0
    before = finished(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        status, _, err = run(*command, "--hpo.n_trials", "2")
        assert status == 2
        assert f"run_dir: no permission to write in {disk / 'study'}" in err
        assert "Traceback" not in err
        status, out, err = run("status", str(disk / "study"))
        assert status == 0, err
        assert "best" in out
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert run(*command, "--hpo.n_trials", "2")[0] == 0
    assert before.items() <= finished(disk).items()


@pytest.mark.parametrize("days", [-400, 400])
def test_a_clock_that_jumps_changes_no_result(
    run: Run, search: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    calls = 0

    class Jumping(real.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> real.datetime:  # type: ignore[override]
            nonlocal calls
            calls += 1
            return real.datetime.now(tz) + real.timedelta(days=days if calls > 7 else 0)

    with monkeypatch.context() as patched:
        patched.setattr("optuna.storages.journal._storage.datetime", Jumping)
        status, out, err = run(*on(tmp_path / "jumped", search))
    assert status == 0, err
    assert calls > 7
    assert "Traceback" not in err
    assert run(*on(tmp_path, search))[0] == 0
    assert list(finished(tmp_path / "jumped").values()) == list(finished(tmp_path).values())
    assert best_of(tmp_path / "jumped") == best_of(tmp_path)
    for command in ("status", "report"):
        status, out, err = run(command, str(tmp_path / "jumped" / "study"))
        assert status == 0, err
        assert not re.search(r"-\d+[:.]\d+", out)
    summary = json.loads((tmp_path / "jumped" / "study" / "summary.json").read_text())
    assert summary["wall_seconds"] >= 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model.dropout", "0.25"], "model.dropout: "),
        (["--hpo.pruner.name", "median"], "hpo.pruner.name: asha in the folder, median requested"),
        (
            ["--hpo.space", '{"model.optimizer.lr": {"low": 1.0e-4, "high": 1.0e-3}}'],
            "hpo.space.model.optimizer.lr.high",
        ),
    ],
)
def test_of_two_searches_with_other_options_in_one_folder_one_is_refused(
    search: list[str], tmp_path: Path, more: list[str], said: str
) -> None:
    processes = [start([*search, "--hpo.n_trials", "4"]), start([*search, "--hpo.n_trials", "4", *more])]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        stop(processes)
    status = [process.returncode for process in processes]
    assert sorted(status) == [0, 2], outputs
    refused = outputs[status.index(2)]
    assert said.split(":")[0] in refused
    assert "Traceback" not in refused
    assert refused.count("lightning-bge: ") == 1
    assert len([trial for trial in trials(tmp_path / "study") if trial.state == TrialState.RUNNING]) == 0
    assert (tmp_path / "study" / "summary.json").exists()
