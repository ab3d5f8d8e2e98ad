"""Processes that share a study's journal: they import neither torch nor transformers, and start within a second."""

import subprocess
import sys

import optuna

from lightning_bge.hpo.storage.journal import open_storage
from lightning_bge.hpo.storage.workers import this_worker


def start(code, path):
    """Run the code in a process with the journal's path as its argument, and wait until it prints `ready`."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def finish(process):
    """Wait for its end."""
    process.stdout.close()
    process.stdin.close()
    process.wait()


def create(path):
    """A study in a new journal."""
    return optuna.create_study(study_name="s", storage=open_storage(path), direction="maximize")


def pretend(study, **changes):
    """Leave a RUNNING trial with a changed record of its worker, and return its number."""
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial.set_user_attr("worker", {**this_worker(), **changes})
    return trial.number
