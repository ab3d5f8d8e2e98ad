"""Who ends a study, and what a process writes that opens it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.storages import InMemoryStorage

from lightning_bge.hpo import run as run_module
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.run import _leave_to_others, prepare_study
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.storage import workers as workers_module
from lightning_bge.hpo.storage.retrying import Retries, RetryingStorage
from lightning_bge.hpo.storage.shared import StorageWorkers
from lightning_bge.hpo.storage.study_storage import StudyStorage, open_study_storage
from lightning_bge.hpo.storage.workers import Worker
from lightning_bge.hpo.text_experiment import TextExperiment
from lightning_bge.hpo.trials import N_TRIALS
from lightning_bge.runtime.stop import StopRequest
from tests.helpers.small_experiment import DOTTED_SPACE, small_experiment


@pytest.fixture(params=["journal", "shared storage"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> StudyStorage:
    if request.param == "journal":
        return open_study_storage(tmp_path / "study", worker_timeout=1.0)
    storage = RetryingStorage(InMemoryStorage(), Retries("the storage", 10.0))
    return StudyStorage(tmp_path, storage, StorageWorkers(tmp_path, storage, "s", 1.0), "s")


def leaves(place: StudyStorage, worker: Worker) -> bool:
    """Whether a worker leaves the study to others, when the time is over."""
    queue: Any = SimpleNamespace(place=place, worker=worker)
    return _leave_to_others(queue, StopRequest())


def test_of_two_processes_whose_time_is_over_one_ends_the_study(place: StudyStorage) -> None:
    with place.worker() as first, place.worker() as other:
        assert leaves(place, first)
        assert first.id not in place.workers.living()
        assert not leaves(place, other)
        assert other.id in place.workers.living()


def test_a_study_is_not_left_to_a_process_that_is_dead(place: StudyStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """One on another machine, of which it shows only after some time."""
    with monkeypatch.context() as patch:
        patch.setattr(workers_module, "kernel_id", lambda: "other")
        dead = Worker(place.run_dir.with_name("there") if place.name else place.run_dir, place.workers)
    with place.worker() as worker, dead:
        dead._stop.set()
        assert dead.id in place.workers.living()
        begun = time.monotonic()
        assert not leaves(place, worker)
        assert time.monotonic() - begun > 0.5
        dead._stop.clear()


# ---------------------------------------------------------------------- opening


Prepare = Callable[..., optuna.Study]


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Prepares a study with some options, as one more process."""
    monkeypatch.setattr(run_module, "record_run", lambda *_: None)
    monkeypatch.setattr(TextExperiment, "identity", lambda *_: {"monitor.metric": "loss"})
    monkeypatch.setattr(run_module, "used_versions", lambda _: {})
    experiment = small_experiment(tmp_path, 1)
    experiment = replace(experiment, config=experiment.config.clone())
    (tmp_path / "study").mkdir()
    storage = RetryingStorage(InMemoryStorage(), Retries("the storage", 10.0))
    place = StudyStorage(tmp_path / "study", storage, StorageWorkers(tmp_path / "study", storage, "s", 60.0), "s")

    def call(**options: Any) -> optuna.Study:
        hpo = StudyConfig(**{"space": DOTTED_SPACE, **options})
        return prepare_study(experiment, hpo, parse_space(hpo.space), Steps(2, 1), place, joins=False)

    call.place = place  # type: ignore[attr-defined]
    return call


def test_a_process_that_comes_again_does_not_ask_for_fewer_trials_while_others_are_at_work(prepare: Prepare) -> None:
    assert prepare(n_trials=5).user_attrs[N_TRIALS] == 5
    with prepare.place.worker():  # type: ignore[attr-defined]
        assert prepare(n_trials=9).user_attrs[N_TRIALS] == 9
        assert prepare(n_trials=5).user_attrs[N_TRIALS] == 9
    assert prepare(n_trials=5).user_attrs[N_TRIALS] == 5


def test_a_process_that_only_starts_workers_is_not_at_work_itself(prepare: Prepare) -> None:
    prepare(n_trials=5)
    study = prepare(n_trials=5, space={"model.dropout": {"choices": [0.0, 0.1]}})
    assert study.study_name == "s-space-2"
