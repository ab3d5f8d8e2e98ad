from __future__ import annotations

import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from lightning_bge.hpo.storage import workers as workers_module
from lightning_bge.hpo.storage.retrying import Retries, RetryingStorage, _PassesOn
from lightning_bge.hpo.storage.shared import StorageWorkers, TicketLock
from lightning_bge.hpo.storage.workers import Worker
from lightning_bge.runtime.compat.optuna import cached_storage
from lightning_bge.runtime.stop import Stopped
from tests.helpers.paths import ROOT

NAME, LOCKS = "s", "s-locks"
TIMEOUT = 0.6


def database(path: Path, grace: int) -> BaseStorage:
    """A storage with Optuna's heartbeat."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return cached_storage(RDBStorage(f"sqlite:///{path}", heartbeat_interval=1, grace_period=grace))


@pytest.fixture(params=["without heartbeat", "with heartbeat"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> RetryingStorage:
    inner = InMemoryStorage() if request.param == "without heartbeat" else database(tmp_path / "s.db", grace=2)
    return RetryingStorage(inner, Retries("the storage", 10.0))


@pytest.fixture
def workers(storage: RetryingStorage, tmp_path: Path) -> StorageWorkers:
    return StorageWorkers(tmp_path / "here", storage, NAME, TIMEOUT)


@pytest.fixture
def elsewhere(storage: RetryingStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A worker of another machine: its lock file is not seen here."""
    with monkeypatch.context() as patch:
        patch.setattr(workers_module, "kernel_id", lambda: "other")
        worker = Worker(tmp_path / "there", StorageWorkers(tmp_path / "there", storage, NAME, TIMEOUT))
    with worker:
        yield worker


def states(storage: RetryingStorage, name: str) -> list[str]:
    trials = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
    return [trial.state.name for trial in trials]


def wait_until_gone(workers: StorageWorkers, worker: Worker) -> None:
    until = time.monotonic() + 20
    while worker.id in workers.living():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_worker_lives_from_its_beginning_to_its_end(workers: StorageWorkers, storage: RetryingStorage) -> None:
    assert workers.seen_alive() == set()
    with Worker(workers.run_dir, workers) as one:
        with Worker(workers.run_dir, workers) as other:
            assert workers.living() == workers.seen_alive() == {one.id, other.id}
        assert workers.living() == {one.id}
    assert workers.living() == set()
    assert states(storage, "s-workers") == ["COMPLETE", "COMPLETE"]


def test_a_worker_elsewhere_that_gives_signs_lives(workers: StorageWorkers, elsewhere: Worker) -> None:
    workers.timeout = 2.5  # of the one who judges: signs that come late on a busy machine do no harm
    until = time.monotonic() + 3.5
    while time.monotonic() < until:
        assert elsewhere.id in workers.living()
        time.sleep(0.1)
    assert workers.any_surely_lives({elsewhere.id})


def test_a_worker_elsewhere_without_signs_is_gone_and_learns_it(
    workers: StorageWorkers, storage: RetryingStorage, elsewhere: Worker
) -> None:
    assert elsewhere.id in workers.living()
    elsewhere._stop.set()  # as where the machine was suspended
    wait_until_gone(workers, elsewhere)
    assert states(storage, "s-workers") == ["FAIL"]
    former = elsewhere.id
    assert not elsewhere.workers.give_sign(elsewhere)
    elsewhere._counts_as_gone = True  # what its thread notes
    elsewhere._stop.clear()
    elsewhere.renew()
    assert elsewhere.id != former
    assert elsewhere.id in workers.living()


def test_a_worker_that_died_before_its_first_sign_is_gone(
    workers: StorageWorkers, storage: RetryingStorage, elsewhere: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StorageWorkers, "give_sign", lambda self, worker: True)
    with monkeypatch.context() as patch:
        patch.setattr(workers_module, "kernel_id", lambda: "other")
        silent = Worker(workers.run_dir.with_name("there"), elsewhere.workers)
    elsewhere.workers.add(silent)
    wait_until_gone(workers, silent)


def test_nobody_is_taken_for_gone_right_after_an_outage(
    workers: StorageWorkers, storage: RetryingStorage, elsewhere: Worker
) -> None:
    workers.timeout = 2.5
    workers._since = -100.0
    elsewhere._stop.set()
    assert elsewhere.id in workers.living()  # from now on this process sees no new sign
    time.sleep(3.2)
    storage.retries.last_outage = time.monotonic()
    assert elsewhere.id in workers.living()
    storage.retries.last_outage = -100.0
    assert elsewhere.id not in workers.living()


class WithoutHeartbeat(_PassesOn):  # type: ignore[misc]
    """As a proxy: another storage without its heartbeat."""

    def __init__(self, inner: BaseStorage) -> None:
        self.inner, self.retries = inner, Retries("inner", 10.0)


def test_a_worker_on_the_database_is_judged_by_those_behind_a_proxy(tmp_path: Path) -> None:
    """A proxy has no heartbeat, and the number that grows is there for all."""
    both = database(tmp_path / "s.db", grace=60)
    direct = StorageWorkers(tmp_path / "there", RetryingStorage(both, Retries("the database", 10.0)), NAME, TIMEOUT)
    proxy = RetryingStorage(WithoutHeartbeat(both), Retries("the proxy", 10.0))
    judge = StorageWorkers(tmp_path / "here", proxy, NAME, TIMEOUT)
    with Worker(tmp_path / "there", direct) as worker:
        assert worker.id in judge.living()
        worker._stop.set()
        wait_until_gone(judge, worker)
        worker._stop.clear()


def test_a_killed_worker_under_this_kernel_is_gone_at_once(workers: StorageWorkers, tmp_path: Path) -> None:
    workers.timeout = 1000.0
    with Worker(workers.run_dir, workers) as worker:
        assert worker.id in workers.seen_alive()
        worker._lock.release()  # what the kernel does
        assert worker.id not in workers.seen_alive()
        assert worker.id not in workers.living()


def test_a_worker_that_was_registered_twice_counts_once(workers: StorageWorkers, storage: RetryingStorage) -> None:
    worker = Worker(workers.run_dir, workers)
    workers.add(worker)  # the answer to this call was lost
    with worker:
        assert workers.living() == {worker.id}
    assert workers.living() == set()


# ---------------------------------------------------------------------- the lock


def test_one_after_the_other_holds_the_lock(workers: StorageWorkers, storage: RetryingStorage) -> None:
    inside, most, order = 0, 0, []

    def run(number: int) -> None:
        nonlocal inside, most
        lock = TicketLock(storage, LOCKS, workers)
        with Worker(workers.run_dir, workers) as worker:
            for _ in range(3):
                with lock.hold(worker):
                    inside += 1
                    most = max(most, inside)
                    order.append(number)
                    time.sleep(0.01)
                    inside -= 1

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert sorted(order) == sorted([0, 1, 2, 3] * 3)
    assert set(states(storage, LOCKS)) == {"COMPLETE"}


def test_two_locks_of_a_study_do_not_wait_for_each_other(workers: StorageWorkers, storage: RetryingStorage) -> None:
    with (
        Worker(workers.run_dir, workers) as worker,
        TicketLock(storage, LOCKS, workers).hold(worker),
        TicketLock(storage, "s-locks-end", workers).hold(worker),
    ):
        assert states(storage, LOCKS) == states(storage, "s-locks-end") == ["RUNNING"]


def test_the_lock_of_a_worker_that_is_gone_is_taken_over(
    workers: StorageWorkers, storage: RetryingStorage, elsewhere: Worker
) -> None:
    lock = TicketLock(storage, LOCKS, workers)
    lock._take(elsewhere)
    elsewhere._stop.set()
    with Worker(workers.run_dir, workers) as worker, lock.hold(worker):
        assert states(storage, LOCKS) == ["FAIL", "RUNNING"]


def test_a_ticket_that_was_created_twice_blocks_nobody(workers: StorageWorkers, storage: RetryingStorage) -> None:
    lock = TicketLock(storage, LOCKS, workers)
    with Worker(workers.run_dir, workers) as worker:
        lock._take(worker)  # the answer to this call was lost
        with lock.hold(worker):
            assert states(storage, LOCKS) == ["FAIL", "RUNNING"]


def test_a_ticket_that_others_have_ended_is_taken_anew(
    workers: StorageWorkers, storage: RetryingStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = TicketLock(storage, LOCKS, workers), TicketLock._take
    tickets: list[int] = []

    def take(self: TicketLock, worker: Worker) -> int:
        ticket = taken(self, worker)
        if not tickets:
            storage.set_trial_state_values(ticket, TrialState.FAIL)
        tickets.append(ticket)
        return ticket

    monkeypatch.setattr(TicketLock, "_take", take)
    with Worker(workers.run_dir, workers) as worker, lock.hold(worker):
        assert len(tickets) == 2


def test_one_that_is_gone_in_the_middle_of_the_queue_blocks_nobody(
    workers: StorageWorkers, storage: RetryingStorage, elsewhere: Worker
) -> None:
    lock, order = TicketLock(storage, LOCKS, workers), []
    with Worker(workers.run_dir, workers) as holder:

        def run(name: str) -> None:
            with Worker(workers.run_dir, workers) as worker, lock.hold(worker):
                order.append(name)

        with lock.hold(holder):
            lock._take(elsewhere)
            elsewhere._stop.set()
            threads = []
            for number in range(5):
                threads.append(threading.Thread(target=run, args=(f"waiter {number}",)))
                threads[-1].start()
                while len(states(storage, LOCKS)) < number + 3:
                    time.sleep(0.01)
            order.append("holder")
        for thread in threads:
            thread.join()
    assert order == ["holder", *(f"waiter {number}" for number in range(5))]
    assert states(storage, LOCKS) == ["COMPLETE", "FAIL", *["COMPLETE"] * 5]


def test_one_that_stops_while_it_waits_lets_nobody_in_before_the_holder_has_ended(
    workers: StorageWorkers, storage: RetryingStorage
) -> None:
    lock = TicketLock(storage, LOCKS, workers)
    with (
        Worker(workers.run_dir, workers) as holder,
        Worker(workers.run_dir, workers) as stopped,
        Worker(workers.run_dir, workers) as third,
    ):
        with lock.hold(holder):
            with pytest.raises(Stopped), lock.hold(stopped, lambda: True):
                raise AssertionError("it holds the lock together with another one")
            assert states(storage, LOCKS) == ["RUNNING", "FAIL"]
            with pytest.raises(Stopped), lock.hold(third, lambda: True):
                raise AssertionError("it holds the lock together with another one")
        with lock.hold(third):
            assert states(storage, LOCKS) == ["COMPLETE", "FAIL", "FAIL", "RUNNING"]


def test_those_who_wait_do_not_list_all_tickets(
    workers: StorageWorkers, storage: RetryingStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, entered = TicketLock(storage, LOCKS, workers), []

    def run() -> None:
        with Worker(workers.run_dir, workers) as worker, lock.hold(worker):
            entered.append(worker.id)

    with Worker(workers.run_dir, workers) as holder, lock.hold(holder):
        monkeypatch.setattr(lock, "_end_lost", lambda *_: pytest.fail("all tickets were listed"))
        threads = [threading.Thread(target=run) for _ in range(6)]
        for thread in threads:
            thread.start()
        while len(states(storage, LOCKS)) < 7:
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert len(set(entered)) == 6


def test_who_waits_may_read_ahead(workers: StorageWorkers, storage: RetryingStorage) -> None:
    lock, seen = TicketLock(storage, LOCKS, workers), []

    def run() -> None:
        with Worker(workers.run_dir, workers) as worker:
            with lock.hold(worker, when_near=lambda: seen.append(states(storage, LOCKS)[0])):
                pass
            with lock.hold(worker, when_near=lambda: seen.append("free")):  # nobody else holds it
                pass

    with Worker(workers.run_dir, workers) as holder:
        thread = threading.Thread(target=run)
        with lock.hold(holder):
            thread.start()
            while not seen:
                time.sleep(0.01)
        thread.join()
    assert seen == ["RUNNING"]


PROCESS = """
import sys, time
from pathlib import Path
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from lightning_bge.hpo.storage.retrying import Retries, RetryingStorage
from lightning_bge.hpo.storage.shared import StorageWorkers, TicketLock
from lightning_bge.hpo.storage.workers import Worker

place = Path(sys.argv[1])
storage = RetryingStorage(JournalStorage(JournalFileBackend(str(place / "j.log"))), Retries("it", 10.0))
workers = StorageWorkers(place / "run", storage, "s", 60.0)
counter = place / "counter"
with Worker(place / "run", workers) as worker:
    for _ in range(8):
        with TicketLock(storage, "s-locks", workers).hold(worker):
            value = int(counter.read_text())
            time.sleep(0.005)
            counter.write_text(str(value + 1))
"""


def test_processes_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / "counter").write_text("0")
    command = [sys.executable, "-W", "ignore", "-c", PROCESS, str(tmp_path)]
    running = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0] * 3, errors
    assert (tmp_path / "counter").read_text() == "24"
    storage = RetryingStorage(JournalStorage(JournalFileBackend(str(tmp_path / "j.log"))), Retries("it", 10.0))
    assert states(storage, "s-workers") == ["COMPLETE"] * 3
