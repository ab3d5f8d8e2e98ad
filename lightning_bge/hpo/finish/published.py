"""The results of a study where its processes on all machines find them, besides the run folder of this one."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning_bge.hpo.storage.files import study_files
from lightning_bge.hpo.trial.outer_fold import OUTER_ROWS
from lightning_bge.runtime.locations import Location, RemotePath, file_sizes, local_copy
from lightning_bge.runtime.run_folder import create_folder, json_text, read_json, write_atomically, write_text

SUMMARY_FILE, MODEL = "summary.json", "model"
TABLES = ("best.yaml", "trials.csv", "oof.csv", "test.csv", "nested.csv", OUTER_ROWS)
RECORDS = ("config.yaml", "run.json")  # of this machine's calls


def publish_results(run_dir: Path, files: Location) -> None:
    """Copy the results of a run folder to the location of the study's files, unless they are there.

    The summary is deleted first and written last: while it is there, everything else is.

    Args:
        run_dir: with the results.
        files: the location; nothing is done where it is the run folder.
    """
    summary = read_json(run_dir / SUMMARY_FILE)
    if files == run_dir or summary is None:
        return
    model = None if summary["model_dir"] is None else Path(summary["model_dir"])
    if model is not None:
        summary["model_dir"] = str(files / MODEL)
    text, there = json_text(summary), files / SUMMARY_FILE
    if there.is_file() and there.read_text(encoding="utf-8") == text:
        return
    there.unlink(missing_ok=True)
    if model is not None and model != files / MODEL and model.is_dir():  # else it was published from another machine
        _publish_folder(model, files / MODEL)
    for name in (*TABLES, *RECORDS):
        if (run_dir / name).is_file():
            _publish(run_dir / name, files / name)
    write_text(there, text)


def fetch_results(files: Location, run_dir: Path) -> None:
    """Copy the published results into a run folder, except for the model, which the summary names where it is."""
    for name in (*TABLES, SUMMARY_FILE):
        if (files / name).is_file():
            with local_copy(files / name) as copy:
                _copy(copy, run_dir / name)


def publish_report(report: Path, files: str | None) -> None:
    """Copy the report of a run folder to the location of the study's files (`hpo.files`)."""
    location = study_files(files, report.parent)
    if location != report.parent:
        _publish(report, location / report.name)


def _publish(path: Path, target: Location) -> None:
    """Copy a file to a location, whole or not at all."""
    if isinstance(target, RemotePath):
        target.upload(path)
    else:
        _copy(path, target)


def _publish_folder(folder: Path, target: Location) -> None:
    names = file_sizes(folder)
    for name in file_sizes(target).keys() - names.keys():
        (target / name).unlink(missing_ok=True)
    for name in names:
        for place in (target.parent, target, (target / name).parent):
            create_folder(place)
        _publish(folder / name, target / name)


def _copy(path: Path, target: Path) -> None:
    write_atomically(target, lambda draft: shutil.copyfile(path, draft))
