from __future__ import annotations

import threading
from pathlib import Path

import pytest
from optuna.storages import InMemoryStorage

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
