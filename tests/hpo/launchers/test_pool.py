"""Several workers of a study: replaced, counted and stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import optuna
import pytest
from optuna.trial import create_trial

from lightning_bge.errors import StudyError
from lightning_bge.hpo.launchers import pool as pool_module
from lightning_bge.hpo.launchers.pool import WorkerPool
from lightning_bge.hpo.storage.study_storage import StudyStorage, open_study_storage


class FakeWorker:
    """A worker that has ended with a status at its first look; None: it runs until it is stopped."""

    where = "its log"
    is_waiting = False

    def __init__(self, status: int | None, act: Callable[[], object] = lambda: None) -> None:
        self.status, self._act, self.calls = status, act, list[str]()

    def poll(self) -> int | None:
        self._act()
        return self.status

    def waits(self) -> bool:
        return self.is_waiting

    def output(self) -> str:
        return "a line\nlightning-bge: data.train_file: there is no such file"

    def terminate(self) -> None:
        self.calls.append("terminate")
        self.status = -signal.SIGTERM

    def kill(self) -> None:
        self.calls.append("kill")


class FakeLauncher:
    """Starts workers that were made before."""

    def __init__(self, n_workers: int, workers: Iterable[FakeWorker]) -> None:
        self.n_workers, self._workers = n_workers, iter(workers)
        self.started: list[tuple[int, float | None]] = []

    def describe(self, run_dir: Path) -> str:
        return f"{self.n_workers} fake workers"

    def start(self, run_dir: Path, number: int, until: float | None) -> FakeWorker:
        self.started.append((number, until))
        return next(self._workers)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "POLL_SECONDS", 0.001)


@pytest.fixture
def place(tmp_path: Path) -> StudyStorage:
    return open_study_storage(tmp_path)


@pytest.fixture
def study(place: StudyStorage) -> optuna.Study:
    return optuna.create_study(storage=place.storage, study_name="s")


def run(study: optuna.Study, place: StudyStorage, launcher: FakeLauncher, timeout: float | None = None) -> list[int]:
    """Run a pool; returns the numbers of the trials of which it printed a line."""
    shown = list[int]()
    WorkerPool(study, place, lambda _, trial: shown.append(trial.number), launcher, timeout).run()  # type: ignore[arg-type]
    return shown


def test_the_pool_ends_with_its_workers(study: optuna.Study, place: StudyStorage) -> None:
    workers = [FakeWorker(0), FakeWorker(0)]
    launcher = FakeLauncher(2, workers)
    study.add_trial(create_trial(value=1.0))
    assert run(study, place, launcher) == []  # it had ended before
    assert launcher.started == [(0, None), (1, None)]
    assert [one.calls for one in workers] == [["kill"], ["kill"]]  # what they held is freed


def test_a_line_for_each_trial(study: optuna.Study, place: StudyStorage) -> None:
    add = lambda: study.add_trial(create_trial(value=1.0))  # noqa: E731
    assert run(study, place, FakeLauncher(1, [FakeWorker(0, add)])) == [0]


def test_a_worker_that_dies_is_replaced(
    study: optuna.Study, place: StudyStorage, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = FakeLauncher(2, [FakeWorker(-9), FakeWorker(0), FakeWorker(1), FakeWorker(0)])
    run(study, place, launcher)
    assert [number for number, _ in launcher.started] == [0, 1, 0, 0]
    printed = capsys.readouterr().out
    assert "a worker has ended with status -9 and is replaced; see its log" in printed
    assert "a worker has ended with status 1 and is replaced" in printed


def test_workers_that_die_one_after_another_end_the_study(study: optuna.Study, place: StudyStorage) -> None:
    launcher = FakeLauncher(1, (FakeWorker(-9) for _ in iter(int, 1)))
    with pytest.raises(StudyError, match=r"the workers die one after another; the last lines of its log:\na line"):
        run(study, place, launcher)
    assert len(launcher.started) == 1 + pool_module.DEATHS


def test_deaths_with_trials_in_between_are_borne(study: optuna.Study, place: StudyStorage) -> None:
    add = lambda: study.add_trial(create_trial(value=1.0))  # noqa: E731
    dying = [FakeWorker(-9, add) for _ in range(3 * pool_module.DEATHS)]
    run(study, place, FakeLauncher(1, [*dying, FakeWorker(0)]))
    assert len(study.trials) == len(dying)


def test_an_error_that_the_user_can_fix_stops_all(study: optuna.Study, place: StudyStorage) -> None:
    other = FakeWorker(None)
    with pytest.raises(StudyError, match=r"^data.train_file: there is no such file$"):
        run(study, place, FakeLauncher(2, [other, FakeWorker(2)]))
    assert other.calls == ["terminate", "kill"]


def test_a_stop_lets_the_workers_save(study: optuna.Study, place: StudyStorage) -> None:
    workers = [FakeWorker(None, lambda: os.kill(os.getpid(), signal.SIGTERM)), FakeWorker(None)]
    with pytest.raises(SystemExit) as ended:
        run(study, place, FakeLauncher(2, workers))
    assert ended.value.code == 143
    assert [one.calls for one in workers] == [["terminate", "kill"]] * 2


def test_workers_that_never_begin_are_given_up_when_the_others_have_ended(
    study: optuna.Study, place: StudyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "IDLE_SECONDS", 0.2)
    waiting = FakeWorker(None)
    waiting.is_waiting = True
    run(study, place, FakeLauncher(2, [FakeWorker(0), waiting]))
    assert waiting.calls == ["terminate", "kill"]


def test_a_worker_that_lives_is_waited_for(
    study: optuna.Study, place: StudyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "IDLE_SECONDS", 0.05)
    looks, living = list[int](), FakeWorker(None)

    def look() -> None:
        looks.append(1)
        living.is_waiting = len(looks) % 2 == 0  # now and then it does not answer in time
        if len(looks) == 200:
            living.status = 0

    living._act = look
    run(study, place, FakeLauncher(2, [FakeWorker(0), living]))
    assert living.calls == ["kill"]


def test_the_time_is_handed_on(study: optuna.Study, place: StudyStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module.time, "time", lambda: 1000.0)
    launcher = FakeLauncher(1, [FakeWorker(0)])
    run(study, place, launcher, timeout=60)
    assert launcher.started == [(0, 1060.0)]
