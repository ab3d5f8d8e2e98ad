"""Nested cross-validation through the command line: in one process, with several workers, and what is shown of it."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.trial import TrialState

from tests.helpers.cli_processes import start, stop, trials, wait_for

Run = Callable[..., tuple[int, str, str]]
NESTED = ("--hpo.outer_folds", "2", "--hpo.pruner.name", "none", "--trainer.max_epochs", "1")


def predicted_groups(sample: Path, study: Path) -> dict[str, set[str]]:
    """The groups of the rows of each outer fold."""
    with (sample / "train.csv").open(newline="") as file:
        groups = [row["post_id"] for row in csv.DictReader(file)]
    found: dict[str, set[str]] = {}
    with (study / "nested.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["row"]) for line in lines] == list(range(len(groups)))
    for line, group in zip(lines, groups, strict=True):
        found.setdefault(line["outer_fold"], set()).add(group)
    return found


def test_a_nested_study_and_what_status_and_report_show_of_it(
    run: Run, search: list[str], sample: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    test_file = ["--data.test_file", str(sample / "test.csv")]
    status, out, err = run(*search, *NESTED, *test_file, "--hpo.n_trials", "1")
    assert status == 0, err
    for words in (
        "nested cross-validation: 2 inner studies before the final one, about 3 times the hours",
        f"outer fold 2 of 2: {study / 'outer_folds' / '1'}",
        "rows of the outer fold, scored once",
        "test file, scored once",
        "price: 2 inner studies, about 3 times the hours",
        "report.html",
    ):
        assert words in out
    folds = predicted_groups(sample, study)
    assert set(folds) == {"0", "1"}
    assert not folds["0"] & folds["1"]
    summary = json.loads((study / "summary.json").read_text())
    assert summary["test_file"] == str(sample / "test.csv")
    assert isinstance(summary["baseline"], float)  # of the final study alone
    inner = json.loads((study / "outer_folds" / "0" / "summary.json").read_text())
    assert (inner["baseline"], inner["nested"]) == (None, None)
    rows = (study / "nested.csv").read_text().splitlines()[1:]
    assert sum(fold["rows"] for fold in summary["nested"]["folds"]) == len(rows)
    status, out, _ = run("status", str(study))
    assert (status, "nested     2 of 2 inner studies have results" in out) == (0, True)
    status, out, _ = run("status", str(study / "outer_folds" / "1"))
    assert (status, "study 1: finished" in out) == (0, True)
    status, out, _ = run("report", str(study / "outer_folds" / "1"))
    assert (status, Path(out.strip()).is_file()) == (0, True)


@pytest.mark.slow
def test_several_workers_run_study_after_study_and_a_killed_run_continues_in_its_outer_fold(
    search: list[str], sample: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    inner = [study / "outer_folds" / str(number) for number in (0, 1)]
    command = [*search, *NESTED, "--hpo.n_trials", "2", "--hpo.workers", "2"]
    process = start(command)
    try:
        wait_for(lambda: (inner[0] / "summary.json").exists(), process)
        journal = inner[1] / "journal.log"
        wait_for(lambda: journal.exists() and '"state":1' in journal.read_text(), process)  # a trial is complete
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        before = [(t.number, t.value, t.datetime_complete) for t in trials(inner[0], "0")]
        again = start(command)
        out = again.communicate(timeout=500)[0]
    finally:
        stop([process])
    assert again.returncode == 0, out
    assert [(t.number, t.value, t.datetime_complete) for t in trials(inner[0], "0")] == before
    for folder, name in ((inner[1], "1"), (study, "study")):
        assert [t.state for t in trials(folder, name)].count(TrialState.COMPLETE) == 2
    assert set(predicted_groups(sample, study)) == {"0", "1"}
    assert out.count("2 workers; what each prints is in") == 3
    joined = start(["worker", str(study)])  # nothing is left to do
    out = joined.communicate(timeout=120)[0]
    assert joined.returncode == 0, out
    assert len(trials(study)) == 2
