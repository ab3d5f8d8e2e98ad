"""The program in processes of its own, and the studies that they leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.trial import TrialState

from lightning_bge.hpo.storage.journal import open_storage
from tests.helpers.paths import ROOT


def trials(folder: Path, name: str = "study") -> list[optuna.trial.FrozenTrial]:
    """The trials of a study of a run folder."""
    return optuna.load_study(study_name=name, storage=open_storage(folder / "journal.log")).trials


def start(args: list[str], folder: Path | None = None) -> subprocess.Popen[str]:
    """Start the program in a folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "lightning_bge.cli", *args],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell that runs the tests in the background lets them ignore Ctrl-C, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until something is true; fail where the process ends before, or after two minutes."""
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "nothing happened for two minutes"
        time.sleep(0.02)


def running(study: Path, name: str = "study") -> set[int]:
    """The processes that train a trial."""
    if not (study / "journal.log").exists() or not open_storage(study / "journal.log").get_all_studies():
        return set()
    return {t.user_attrs["worker"]["pid"] for t in trials(study, name) if t.state == TrialState.RUNNING}


def stop(processes: list[subprocess.Popen[str]]) -> None:
    """Kill those that still run."""
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.communicate()
