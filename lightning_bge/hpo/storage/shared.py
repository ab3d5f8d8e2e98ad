"""The workers of a study in a database, and its lock: kept in studies beside it, as trials that stand for them.

Optuna's storages have no lock, and the gRPC proxy has no heartbeat. Both are made of what every storage has: trials
that are created in one write, have ascending numbers and are RUNNING until they are ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_bge.errors import StudyError
from lightning_bge.hpo.storage.retrying import RetryingStorage
from lightning_bge.hpo.storage.workers import Worker, Workers
from lightning_bge.hpo.trials import WORKER
from lightning_bge.runtime.compat.optuna import record_heartbeat, stale_trial_ids, trial_id_of
from lightning_bge.runtime.stop import Stopped

log = logging.getLogger("lightning_bge")

WORKERS_SUFFIX, LOCKS_SUFFIX = "-workers", "-locks"  # of the names of the studies beside a study
SIGN = "sign_of_life"  # user attribute of a worker's trial: a number that grows, where there is no heartbeat
HAS_HEARTBEAT = "has_heartbeat"  # user attribute of a worker's trial
LOCK = "lock"  # user attribute of a ticket: which lock it is for
POLL_SECONDS, MOST_SECONDS = 0.02, 2.0  # between two looks at a lock; more for those who wait long, or far behind
QUEUE_SECONDS = 0.05  # half of what each of those before one holds the lock for, about
CHECK_SECONDS = 1.0  # between two looks of those who wait at who lives, for each of those before them


def _study_id(storage: RetryingStorage, name: str) -> int:
    """The id of a study beside another one; it is created where it is not there."""
    optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
    return storage.get_study_id_from_name(name)


def _end(storage: RetryingStorage, trial_id: int, state: TrialState) -> None:
    values = [0.0] if state == TrialState.COMPLETE else None
    with suppress(UpdateFinishedTrialError):  # another process has ended it
        storage.set_trial_state_values(trial_id, state, values)


class StorageWorkers(Workers):
    """Those of a study in a shared storage: each is a trial of a study beside it, RUNNING as long as the worker lives.

    Its sign of life is a number that grows, and that each process watches by its own clock; between processes that
    are connected to a database, and not through a proxy, it is Optuna's heartbeat, which the database's clock judges.
    After an outage of the storage nobody is
    taken for gone until all have had the time to give a sign. The trial of one that is gone is FAIL.

    Args:
        run_dir: the run's folder on this machine.
        storage: of the study.
        study_name: its name.
        timeout: seconds without a sign of life, after which a worker counts as gone.
    """

    def __init__(self, run_dir: Path, storage: RetryingStorage, study_name: str, timeout: float) -> None:
        super().__init__(run_dir, timeout)
        self._storage, self._name = storage, f"{study_name}{WORKERS_SUFFIX}"
        self._own: dict[str, int] = {}
        self._signs, self._since = 0, time.monotonic()

    @cached_property
    def _id(self) -> int:
        return _study_id(self._storage, self._name)

    def add(self, worker: Worker) -> None:
        """Create the worker's trial."""
        template = create_trial(state=TrialState.RUNNING, user_attrs={WORKER: worker.record})
        self._own[worker.id] = self._storage.create_new_trial(self._id, template)
        self.give_sign(worker)

    def give_sign(self, worker: Worker) -> bool:
        """Let the number grow, and record a heartbeat; False: others have taken the worker for gone."""
        trial_id, self._signs = self._own[worker.id], self._signs + 1
        try:
            has_heartbeat = self._storage.retries.call(record_heartbeat, self._storage.inner, trial_id)
            if has_heartbeat and self._signs == 1:
                self._storage.set_trial_user_attr(trial_id, HAS_HEARTBEAT, True)
            self._storage.set_trial_user_attr(trial_id, SIGN, self._signs)
        except UpdateFinishedTrialError:
            return False
        except StudyError as error:  # the thread that trains will have it as well
            log.warning("no sign of life can be given: %s", error)
        return True

    def remove(self, worker: Worker) -> None:
        """End the worker's trial."""
        retries = self._storage.retries
        retries.is_stopping = lambda: True
        try:
            _end(self._storage, self._own.pop(worker.id), TrialState.COMPLETE)
            for trial in self._storage.get_all_trials(self._id, deepcopy=False, states=(TrialState.RUNNING,)):
                if trial.user_attrs[WORKER]["id"] == worker.id:  # created by a call whose answer was lost
                    _end(self._storage, trial_id_of(trial), TrialState.COMPLETE)
        except StudyError as error:
            log.warning("this process counts as gone only in %.0f s: %s", self.timeout, error)

    def living(self, named: Collection[str] = ()) -> set[str]:
        """Those that hold their lock under this kernel, or give signs of life; ends the trials of the others."""
        latest, stale = self._running(self._id)  # a worker is there before its first trial is
        gone = {name for name, trial in latest.items() if self._is_gone(name, trial, stale)}
        for name in gone:
            _end(self._storage, trial_id_of(latest[name]), TrialState.FAIL)
        return latest.keys() - gone

    def seen_alive(self) -> set[str]:
        """As `living`; of workers elsewhere, behind a proxy, it is not known in one look whether they are gone."""
        try:
            study_id = self._storage.get_study_id_from_name(self._name)
        except KeyError:
            return set()
        latest, stale = self._running(study_id)
        return {name for name, trial in latest.items() if self._is_seen(name, trial, stale)}

    def _running(self, study_id: int) -> tuple[dict[str, FrozenTrial], set[int] | None]:
        """The latest trial of each worker, and the ids of those whose heartbeat is too old; None: it is not known."""
        running = self._storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        stale = self._storage.retries.call(stale_trial_ids, self._storage.inner, study_id)
        return {trial.user_attrs[WORKER]["id"]: trial for trial in running}, stale

    def _is_seen(self, name: str, trial: FrozenTrial, stale: set[int] | None) -> bool:
        held = self._holds_lock(name)
        return trial_id_of(trial) not in (stale or ()) if held is None else held

    def _is_gone(self, name: str, trial: FrozenTrial, stale: set[int] | None) -> bool:
        held = self._holds_lock(name)
        if held is not None:
            return not held
        silent = self._is_silent(name, trial.user_attrs.get(SIGN))
        if stale is not None and trial.user_attrs.get(HAS_HEARTBEAT):
            silent = trial_id_of(trial) in stale
        return silent and time.monotonic() - max(self._since, self._storage.retries.last_outage) > self.timeout


class TicketLock:
    """A lock of a study in a shared storage, which outlasts an outage of the storage.

    Whoever wants it creates a ticket, a RUNNING trial in a study beside the study; the lowest number holds the lock,
    and ending the ticket frees it. The tickets of workers that are gone are ended by those who wait.

    Args:
        storage: of the study.
        study_name: its name.
        kind: which of the study's locks it is.
        workers: those that work on it.
    """

    def __init__(self, storage: RetryingStorage, study_name: str, kind: str, workers: Workers) -> None:
        self._storage, self._workers, self._kind = storage, workers, kind
        self._name = f"{study_name}{LOCKS_SUFFIX}"

    @cached_property
    def _id(self) -> int:
        return _study_id(self._storage, self._name)

    @contextmanager
    def hold(self, worker: Worker, is_stopping: Callable[[], object] = bool) -> Iterator[Callable[[], bool]]:
        """Hold the lock for a `with` block, which gets a function that tells whether it is still held.

        Args:
            worker: this process.
            is_stopping: whether this process is to stop; by default it never is.

        Raises:
            Stopped: it is to stop, and others hold the lock.
        """
        ticket = self._take(worker)
        try:
            while not self._is_first(ticket, worker, is_stopping):
                worker.renew()
                ticket = self._take(worker)
            yield lambda: not self._storage.get_trial(ticket).state.is_finished()
        finally:
            _end(self._storage, ticket, TrialState.COMPLETE)

    def _take(self, worker: Worker) -> int:
        attributes: dict[str, Any] = {WORKER: worker.record, LOCK: self._kind}
        template = create_trial(state=TrialState.RUNNING, user_attrs=attributes)
        return self._storage.create_new_trial(self._id, template)

    def _is_first(self, ticket: int, worker: Worker, is_stopping: Callable[[], object]) -> bool:
        """Wait until the ticket is the first one; False: others have ended it, as they took this process for gone."""
        begun = checked = time.monotonic()
        while True:
            running = self._storage.get_all_trials(self._id, deepcopy=False, states=(TrialState.RUNNING,))
            same = [trial for trial in running if trial.user_attrs[LOCK] == self._kind]
            own = next((trial for trial in same if trial_id_of(trial) == ticket), None)
            if own is None:
                return False
            before = [trial for trial in same if trial.number < own.number]
            if not before:
                return True
            # an earlier one of this process was created by a call whose answer it did not get
            gone = {worker.id}
            if time.monotonic() - checked > CHECK_SECONDS * len(before):  # those who are next look for all of them
                checked = time.monotonic()
                gone |= {trial.user_attrs[WORKER]["id"] for trial in before} - self._workers.living()
            for trial in before:
                if trial.user_attrs[WORKER]["id"] in gone:
                    _end(self._storage, trial_id_of(trial), TrialState.FAIL)
            self._wait(before, begun, is_stopping)

    def _wait(self, before: list[FrozenTrial], begun: float, is_stopping: Callable[[], object]) -> None:
        """Wait until the ticket right before this one has ended, for about as long as the queue is expected to take.

        That ticket alone is read: a list of all of them costs each of hundreds of workers a hundred times as much.

        Raises:
            Stopped: this process is to stop.
        """
        last = trial_id_of(max(before, key=lambda trial: trial.number))
        waited = time.monotonic() - begun  # as long as a refit takes
        pause = max(POLL_SECONDS, QUEUE_SECONDS * (len(before) - 1), waited / 20 if len(before) == 1 else 0.0)
        until = time.monotonic() + max(CHECK_SECONDS, 2 * pause)
        while time.monotonic() < until:
            if is_stopping():
                raise Stopped
            time.sleep(min(pause, MOST_SECONDS))
            if self._storage.get_trial(last).state.is_finished():
                return
            if len(before) > 1:
                pause = max(pause / 2, POLL_SECONDS)
