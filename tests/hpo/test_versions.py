"""What the processes of a study compute with, and how a mixture is described."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import create_trial

from lightning_bge.hpo.storage.workers import Worker
from lightning_bge.hpo.trials import COMPUTED_WITH
from lightning_bge.hpo.versions import count_versions, describe_versions, other_versions, used_versions

FIRST = {"torch": "2.9", "transformers": "5.0", "device": "cpu with AVX512"}


def test_the_versions_are_those_of_the_installed_libraries_and_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found = used_versions("cpu")
    assert [found[name] for name in ("torch", "transformers", "tokenizers")] == [
        version(name) for name in ("torch", "transformers", "tokenizers")
    ]
    assert found["device"] == f"cpu with {torch.backends.cpu.get_cpu_capability()}"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    assert used_versions("auto")["device"] == "NVIDIA H100"
    assert used_versions("cpu") == found


def of_the_program(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "lightning_bge"]


def test_only_what_differs_from_the_first_process_is_noted_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    study = optuna.create_study()
    assert other_versions(study, FIRST) == {}  # nothing is known of the first process
    study.set_user_attr(COMPUTED_WITH, FIRST)
    assert other_versions(study, FIRST) == {}
    assert not of_the_program(caplog)
    assert other_versions(study, {**FIRST, "torch": "3.0", "device": "NVIDIA H100"}) == {
        "torch": "3.0",
        "device": "NVIDIA H100",
    }
    [record] = of_the_program(caplog)
    assert "with torch 2.9, cpu with AVX512, this one with torch 3.0, NVIDIA H100" in record.getMessage()


def test_trials_are_counted_by_what_they_were_computed_with() -> None:
    study = optuna.create_study()
    study.set_user_attr(COMPUTED_WITH, FIRST)
    for other in ({}, {"torch": "3.0"}, {"torch": "3.0"}, {"device": "NVIDIA H100"}):
        study.add_trial(create_trial(value=0.5, user_attrs={COMPUTED_WITH: other} if other else {}))
    found = count_versions(study)
    assert found["others"] == [
        {"n_trials": 2, "versions": {"torch": "3.0"}},
        {"n_trials": 1, "versions": {"device": "NVIDIA H100"}},
    ]
    assert describe_versions(found) == [
        "2 of the trials: computed with torch 3.0 instead of torch 2.9, which the study began with "
        "(trials.csv: computed_with)",
        "1 of the trials: computed with NVIDIA H100 instead of cpu with AVX512, which the study began with "
        "(trials.csv: computed_with)",
    ]
    assert describe_versions({"first": FIRST, "others": []}) == []


def test_a_worker_marks_its_trials_where_it_computes_with_others(tmp_path: Path) -> None:
    worker = Worker(tmp_path)
    assert set(worker.attributes) == {"worker"}
    worker.other_versions = {"torch": "3.0"}
    assert worker.attributes[COMPUTED_WITH] == {"torch": "3.0"}
