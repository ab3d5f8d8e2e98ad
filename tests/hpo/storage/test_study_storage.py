from __future__ import annotations

import threading
from pathlib import Path

import pytest
from optuna.storages import InMemoryStorage

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.storage.retrying import Retries, RetryingStorage
from lightning_bge.hpo.storage.shared import StorageWorkers
from lightning_bge.hpo.storage.study_storage import StudyStorage, open_study_storage
from lightning_bge.runtime.stop import Stopped


@pytest.fixture(params=["journal", "shared storage"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> StudyStorage:
    if request.param == "journal":
        return open_study_storage(tmp_path)
    storage = RetryingStorage(InMemoryStorage(), Retries("the storage", 10.0))
    return StudyStorage(tmp_path, storage, StorageWorkers(tmp_path, storage, "s", 60.0), "s")


def test_a_process_that_is_to_stop_does_not_wait_for_the_one_that_ends_the_study(place: StudyStorage) -> None:
    with place.worker() as first, place.worker() as other:
        with place.end_lock(first), pytest.raises(Stopped), place.end_lock(other, lambda: True):
            raise AssertionError("two processes held the lock")
        with place.end_lock(other, lambda: True):
            pass


def test_a_process_waits_for_the_one_that_ends_the_study(place: StudyStorage) -> None:
    with place.worker() as first, place.worker() as other:
        taken = threading.Event()

        def take() -> None:
            with place.end_lock(other, lambda: False):
                taken.set()

        waiting = threading.Thread(target=take)
        with place.end_lock(first):
            waiting.start()
            assert not taken.wait(0.7)  # longer than the time between two looks
        waiting.join(30)
        assert taken.is_set()


def test_a_process_that_others_took_for_gone_does_not_hold_the_lock(tmp_path: Path) -> None:
    storage = RetryingStorage(InMemoryStorage(), Retries("the storage", 10.0))
    place = StudyStorage(tmp_path, storage, StorageWorkers(tmp_path, storage, "s", 60.0), "s")
    with place.worker() as first, place.worker() as other, place.end_lock(first) as is_held:
        assert is_held()
        first._lock.release()  # what the kernel does where it ends
        with place.end_lock(other) as is_held_by_other:
            assert is_held_by_other()
            assert not is_held()


@pytest.mark.parametrize(
    "name", ["", " ", "team/study", "s-workers", "s-locks", "s-locks-end", "s-baseline", "s-space-2"]
)
def test_names_of_what_is_kept_beside_a_study_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"hpo\.study_name: expected a name without /"):
        StudyConfig(study_name=name)


def test_a_name_that_is_too_long_for_a_database_is_refused() -> None:
    StudyConfig(study_name=400 * "ü")
    with pytest.raises(ConfigError, match=r"hpo\.study_name: expected at most 400 characters, got 401"):
        StudyConfig(study_name=401 * "n")


def test_a_folder_with_such_a_name_needs_another_name_of_the_study(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the name of the study: .*got 's-workers'"):
        open_study_storage(tmp_path / "s-workers", "postgresql+psycopg://me@host/studies")
