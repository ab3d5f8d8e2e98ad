"""Searches whose processes are killed: at each kind of write, at random, and while all of them end the study."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow


def run(*arguments: str) -> str:
    """Run a module of the tests; returns what it prints."""
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_search_that_was_stopped_at_a_write_ends_like_an_undisturbed_one() -> None:
    # every fourth of the stops; `--every 1` takes five minutes more
    out = run("tests.tools.kill_everywhere", "--every", "4")
    done, _, all_stops = out.splitlines()[-1].split()[:3]
    assert done == all_stops
    assert int(done) > 40


def test_four_workers_that_are_killed_at_random_lose_nothing() -> None:
    arguments = ["--runs", "1", "--trials", "16", "--kills", "6", "--aimed", "1"]
    [line] = run("tests.tools.chaos", *arguments).splitlines()
    found = json.loads(line)
    assert found["faults"] == []
    assert found["parameter_sets"] == found["n_trials"] >= 16
    assert found["states"]["RUNNING"] == 0


def test_the_end_runs_once_where_all_processes_finish_together(tmp_path: Path) -> None:
    lines = run("tests.helpers.end_together", str(tmp_path), "20").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"status": [0] * 4, "summaries": 1, "refits": 1, "logs": []} for _ in range(20)
    ]
