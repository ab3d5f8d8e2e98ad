"""Runs that a killed process has left without content in a folder of MLflow's; the rest is in test_real_trackers.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_bge.hpo.trackers import mlflow as module


def make_run(folder: Path, name: str, meta: str, study: str | None) -> None:
    """A run as MLflow keeps it."""
    (folder / name / "tags").mkdir(parents=True)
    (folder / name / "meta.yaml").write_text(meta)
    if study is not None:
        (folder / name / "tags" / "study_key").write_text(study)


def test_empty_runs_of_this_study_are_deleted_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, "whole", "run_id: whole", "mine")
    make_run(tmp_path, "torn", "", "mine")
    make_run(tmp_path, "torn-before-its-tags", "", None)
    make_run(tmp_path, "of-another-study", "", "other")
    make_run(tmp_path, "being-written", "", "mine")
    # a process writes one of them while it is waited
    monkeypatch.setattr(module.time, "sleep", lambda _: (tmp_path / "being-written" / "meta.yaml").write_text("x: 1"))
    module._remove_torn(tmp_path, "mine")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "of-another-study", "being-written"}


def test_empty_metrics_of_this_study_are_deleted_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, study in (("one", "mine"), ("other", "other")):
        make_run(tmp_path, name, "run_id: x", study)
        (tmp_path / name / "metrics" / "val").mkdir(parents=True)
        for metric in ("loss", "val/f1"):
            (tmp_path / name / "metrics" / metric).write_text("1700000000000 0.5 1\n")
        (tmp_path / name / "metrics" / "val" / "torn").touch()
        (tmp_path / name / "metrics" / "being-written").touch()

    def write(_: float) -> None:
        (tmp_path / "one" / "metrics" / "being-written").write_text("1700000000000 0.5 1\n")

    monkeypatch.setattr(module.time, "sleep", write)
    module._remove_torn(tmp_path, "mine")
    left = {
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file() and "metrics" in path.parts
    }
    assert {path for path in left if path.startswith("one")} == {
        f"one/metrics/{name}" for name in ("loss", "val/f1", "being-written")
    }
    assert "other/metrics/val/torn" in left
