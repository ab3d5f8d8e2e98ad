"""The results of a study, where its processes on all machines find them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_bge.errors import LocationError
from lightning_bge.hpo.finish.published import fetch_results, publish_report, publish_results
from lightning_bge.hpo.storage.url import PASSWORD
from lightning_bge.runtime.locations import Location, file_sizes
from lightning_bge.runtime.run_folder import create_folder, read_json, write_json, write_text
from tests.helpers.memory_location import memory_location
from tests.helpers.paths import ROOT
from tests.helpers.postgres import SECRET, Postgres


@pytest.fixture(params=["folder", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    found = tmp_path / "files" if request.param == "folder" else memory_location()
    create_folder(found)  # as `join_files` does
    return found


def finished(run_dir: Path, names: tuple[str, ...] = ("weights", "config.json"), **more: Any) -> Path:
    """A run folder with results."""
    for folder in (run_dir, run_dir / "model", run_dir / "model" / "part"):
        create_folder(folder)
    for name in ("trials.csv", "oof.csv", "config.yaml", "model/part/x", *(f"model/{name}" for name in names)):
        write_text(run_dir / name, name)
    write_text(run_dir / "journal.log", "of this machine")
    write_json(run_dir / "summary.json", {"model_dir": str(run_dir / "model"), "best_trial": 3, **more})
    return run_dir


def test_results_and_model_are_published_and_fetched_by_another_machine(files: Location, tmp_path: Path) -> None:
    here, there = finished(tmp_path / "here"), tmp_path / "there"
    publish_results(here, files)
    model = {"model/weights", "model/config.json", "model/part/x"}
    assert file_sizes(files).keys() == {"summary.json", "trials.csv", "oof.csv", "config.yaml", *model}
    assert read_json(files / "summary.json") == {
        "schema_version": 1,
        "model_dir": str(files / "model"),
        "best_trial": 3,
    }
    there.mkdir()
    fetch_results(files, there)
    assert {path.name for path in there.iterdir()} == {"summary.json", "trials.csv", "oof.csv"}
    assert (there / "summary.json").read_text() == (files / "summary.json").read_text(encoding="utf-8")
    assert read_json(here / "summary.json") != read_json(there / "summary.json")  # it has the model itself


def test_a_machine_without_the_model_changes_the_summary_and_leaves_the_model(files: Location, tmp_path: Path) -> None:
    publish_results(finished(tmp_path / "here"), files)
    there = tmp_path / "there"
    there.mkdir()
    fetch_results(files, there)
    write_json(there / "summary.json", {**(read_json(there / "summary.json") or {}), "nested": {"value": 0.5}})
    before = file_sizes(files)
    publish_results(there, files)
    assert (read_json(files / "summary.json") or {})["nested"] == {"value": 0.5}
    assert {n: s for n, s in file_sizes(files).items() if n != "summary.json"} == {
        n: s for n, s in before.items() if n != "summary.json"
    }


def test_what_a_later_model_does_not_have_is_deleted(files: Location, tmp_path: Path) -> None:
    publish_results(finished(tmp_path / "one"), files)
    publish_results(finished(tmp_path / "two", ("weights",), best_trial=4), files)
    assert "model/config.json" not in file_sizes(files)
    assert (read_json(files / "summary.json") or {})["best_trial"] == 4


def test_nothing_is_written_where_the_same_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at, run_dir = memory_location(), finished(tmp_path / "run")
    publish_results(run_dir, at)
    monkeypatch.setattr(at.fs, "put_file", pytest.fail)
    publish_results(run_dir, at)
    publish_results(run_dir, run_dir)
    publish_results(tmp_path, at)  # without a summary


@pytest.mark.parametrize("number", range(1, 8))
def test_while_the_summary_is_there_so_are_all_results_wherever_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    at, puts = memory_location(), list[str]()
    publish_results(finished(tmp_path / "one"), at)
    put = at.fs.put_file

    def fails(local: str, remote: str) -> None:
        puts.append(remote)
        if len(puts) == number:
            raise OSError("gone")
        put(local, remote)

    monkeypatch.setattr(at.fs, "put_file", fails)
    two = finished(tmp_path / "two", best_trial=4)
    with pytest.raises(LocationError):
        publish_results(two, at)
    assert read_json(at / "summary.json") is None
    publish_results(two, at)
    assert (read_json(at / "summary.json") or {})["best_trial"] == 4


def test_the_report_is_published_beside_the_results(tmp_path: Path) -> None:
    report, at = tmp_path / "run" / "report.html", memory_location()
    report.parent.mkdir()
    report.write_text("<html>")
    publish_report(report, None)
    publish_report(report, str(at))
    assert (at / "report.html").read_text() == "<html>"


# ---------------------------------------------------------------------- machines that share a database and a folder


@pytest.mark.slow
def test_machines_with_run_folders_of_their_own_run_one_study(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="make test-slow installs it")
    environment = {**os.environ, PASSWORD: SECRET, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "lightning_bge.cli"]
    subprocess.run([*program, "sample", str(tmp_path / "S")], check=True, env=environment)
    options = ["-c", str(ROOT / "configs/quickstart.yaml"), "--model.name_or_path", str(tmp_path / "S/model")]
    options += ["--data.train_file", str(tmp_path / "S/train.csv"), "--data.test_file", str(tmp_path / "S/test.csv")]
    options += ["--data.cache_dir", str(tmp_path / "cache"), "--run_dir", "study", "--hpo.n_trials", "8"]

    def start(host: str, *more: str) -> subprocess.Popen[str]:
        (tmp_path / host).mkdir(exist_ok=True)
        command = [*program, "hpo", *options, "--hpo.storage", server.url, *more]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=tmp_path / host, env=environment, stdout=pipe, stderr=pipe, text=True)

    shared = ("--hpo.files", f"file://{tmp_path / 'shared'}")
    with Postgres() as server:
        ended = [(one, *one.communicate(timeout=240)) for one in [start("a", *shared), start("b", *shared)]]
        assert [one.returncode for one, *_ in ended] == [0, 0], ended
        workers = "select count(distinct value_json::json->>'host' || (value_json::json->>'pid')) "
        assert server.query(f"{workers} from trial_user_attributes where key = 'worker'") == "2"
        other = start("c")
        _, error = other.communicate(timeout=240)
        assert other.returncode == 2
        assert "this process does not see the files of the study's other processes: expected" in error
        assert "Traceback" not in error
    one, two = (json.loads((tmp_path / host / "study" / "summary.json").read_text()) for host in "ab")
    published = json.loads((tmp_path / "shared" / "summary.json").read_text())
    assert published["model_dir"] == str(tmp_path / "shared" / "model")
    exported = [host for host in "ab" if (tmp_path / host / "study" / "model").is_dir()]
    assert len(exported) == 1  # the other one has found the results
    for summary in (one, two):
        assert {**summary, "model_dir": published["model_dir"]} == published
    assert (tmp_path / "shared" / "report.html").is_file()
    assert not any((tmp_path / host / "study" / "checkpoints").exists() for host in "ab")
