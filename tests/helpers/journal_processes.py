"""Processes that share a study's journal: they import neither torch nor transformers, and start within a second."""

import subprocess
import sys

import optuna

from lightning_bge.hpo.storage.journal import open_storage


def start(code, *arguments):
    """Run the code in a process, and wait until it prints `ready`."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
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
