"""The workers of a study in a database, and its lock: kept in studies beside it, as trials that stand for them.

Optuna's storages have no lock, and the gRPC proxy has no heartbeat. Both are made of what every storage has: trials
that are created in one write, have ascending numbers and are RUNNING until they are ended.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_bge.errors import StudyError
from lightning_bge.hpo.storage.retrying import RetryingStorage
from lightning_bge.hpo.storage.workers import BEATS, Worker, Workers
from lightning_bge.hpo.trials import WORKER
from lightning_bge.runtime.compat.optuna import record_heartbeat, stale_trial_ids, trial_id_of
from lightning_bge.runtime.stop import Stopped

log = logging.getLogger("lightning_bge")

WORKERS_SUFFIX = "-workers"  # of the name of the study beside a study
SIGN = "sign_of_life"  # user attribute of a worker's trial: a number that grows, where there is no heartbeat
HAS_HEARTBEAT = "has_heartbeat"  # user attribute of a worker's trial
POLL_SECONDS, MOST_SECONDS = 0.02, 2.0  # between two looks at the ticket before one's own; more after a long wait
QUEUE_SECONDS = 0.05  # half of what each of those before one holds the lock for, about
LOOKING = 0.05  # the part of a process's time for looking who lives
NEAR = 16  # tickets before one's own, at which a process begins to prepare
STOP_POLL_SECONDS = 0.5  # between two looks whether this process is to stop
# Until all tickets are looked at where the one that is watched does not end: for the one that is next, at first and
# later; for those further behind the square of their distance as long, up to a time that differs, so that few do it.
CHECK_SECONDS, MOST_CHECK_SECONDS, FAR_CHECK_SECONDS = 1.0, 10.0, (60.0, 600.0)


def _study_id(storage: RetryingStorage, name: str) -> int:
    """The id of a study beside another one; it is created where it is not there."""
    optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
    return storage.get_study_id_from_name(name)


def _end(storage: RetryingStorage, trial_id: int, state: TrialState) -> None:
    values = [0.0] if state == TrialState.COMPLETE else None
    with suppress(UpdateFinishedTrialError):  # another process has ended it
        storage.set_trial_state_values(trial_id, state, values)


def _sleep(seconds: float, is_stopping: Callable[[], object]) -> None:
    """Sleep, and look often whether this process is to stop.

    Raises:
        Stopped: it is.
    """
    until = time.monotonic() + seconds
    while True:
        if is_stopping():
            raise Stopped
        if (left := until - time.monotonic()) <= 0:
            return
        time.sleep(min(left, STOP_POLL_SECONDS))


class StorageWorkers(Workers):
    """Those of a study in a shared storage: each is a trial of a study beside it, RUNNING as long as the worker lives.

    Its sign of life is a number that grows, and that each process watches by its own clock; between processes that
    are connected to a database, and not through a proxy, it is Optuna's heartbeat, which the database's clock judges.
    After an outage of the storage nobody is taken for gone until all have had the time to give a sign. The trial of one
    that is gone is FAIL.

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
        self._looked: tuple[float, set[str]] = (-math.inf, set())  # until when it serves

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
        """Those that hold their lock under this kernel, or give signs of life; ends the trials of the others.

        Where all that are named were living a while ago, that serves: for 20 times as long as it takes to look, and at
        most for the time between two signs of life, so that hundreds of workers do not look at each other all the time.
        """
        until, found = self._looked
        now = time.monotonic()
        if not named or now > until or not found.issuperset(named):
            found = self._look()
            took = time.monotonic() - now
            self._looked = now + min(took / LOOKING, self.timeout / BEATS), found
        return found

    def _look(self) -> set[str]:
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

    Whoever wants it creates a ticket, a RUNNING trial in a study beside the study. The lowest number that has not
    ended holds the lock, and COMPLETE frees it; FAIL is a ticket that ended without having freed the lock. So the
    lock is free for a ticket as soon as the one before it is COMPLETE. Those who wait look at single tickets: at first
    at one about half of the way to the holder's, in the end at the one before theirs. A list of all tickets, which
    each of hundreds of workers would have to read again and again, is needed only to end those of workers that are
    gone, where nothing has moved for a while.

    Args:
        storage: of the study.
        name: of the study beside it.
        workers: those that work on the study.
    """

    def __init__(self, storage: RetryingStorage, name: str, workers: Workers) -> None:
        self._storage, self._name, self._workers = storage, name, workers

    @cached_property
    def _id(self) -> int:
        return _study_id(self._storage, self._name)

    @contextmanager
    def hold(
        self,
        worker: Worker,
        is_stopping: Callable[[], object] = bool,
        when_near: Callable[[], object] = bool,
    ) -> Iterator[Callable[[], bool]]:
        """Hold the lock for a `with` block, which gets a function that tells whether it is still held.

        Args:
            worker: this process.
            is_stopping: whether this process is to stop; by default it never is.
            when_near: called where others hold the lock: when few are before this process, and when it is the next.

        Raises:
            Stopped: it is to stop, and others hold the lock.
        """
        ticket, state = self._take(worker), TrialState.FAIL
        try:
            while not self._is_first(ticket, worker, is_stopping, when_near):
                worker.renew()
                ticket = self._take(worker)
            state = TrialState.COMPLETE
            yield lambda: not self._state(ticket).is_finished()
        finally:
            _end(self._storage, ticket, state)

    def _take(self, worker: Worker) -> int:
        template = create_trial(state=TrialState.RUNNING, user_attrs={WORKER: worker.record})
        return self._storage.create_new_trial(self._id, template)

    def _ticket_before(self, number: int, back: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, number - back)

    def _state(self, ticket: int) -> TrialState:
        return self._storage.get_trial(ticket).state

    def _is_first(
        self, ticket: int, worker: Worker, is_stopping: Callable[[], object], when_near: Callable[[], object]
    ) -> bool:
        """Wait until all before a ticket have ended; False: others have ended it, as they took this process for gone.

        Raises:
            Stopped: this process is to stop.
        """

        def wait_for(back: int, pace: float) -> tuple[TrialState, float]:
            """Returns the state of the ticket so many before this one, and the seconds in which one of them ended."""
            other, since = self._ticket_before(number, back), time.monotonic()
            looks = self._looks(back, pace, lambda: self._end_lost(number, worker))
            while not (state := self._state(other)).is_finished():
                _sleep(next(looks), is_stopping)
            return state, min((time.monotonic() - since) / back, MOST_SECONDS)

        number = self._storage.get_trial_number_from_id(ticket)
        back, state = 1, TrialState.COMPLETE  # where no ticket is before it
        while back <= number and not (state := self._state(self._ticket_before(number, back))).is_finished():
            back *= 2
        pace = 0.0
        while back > 1:
            back //= 2
            if back in (NEAR, 1):
                when_near()
            state, pace = wait_for(back, pace)
        while state != TrialState.COMPLETE and back < number:  # the one before has ended while it waited itself
            back += 1
            state, _ = wait_for(back, pace)
        return not self._state(ticket).is_finished()

    def _looks(self, distance: int, pace: float, end_lost: Callable[[], None]) -> Iterator[float]:
        """Seconds to sleep after each look at a ticket so many before one's own, for ever; lost ones are ended.

        Args:
            distance: to the ticket.
            pace: seconds in which a ticket ended before; 0: it is not known.
            end_lost: ends those of workers that are gone.
        """
        begun = checked = time.monotonic()
        check = min(CHECK_SECONDS * distance**2, random.uniform(*FAR_CHECK_SECONDS))
        while True:
            waited = time.monotonic() - begun
            if waited < pace * distance / 2:
                yield pace * distance / 2 - waited
            elif distance == 1:
                yield POLL_SECONDS + min(waited / 20, MOST_SECONDS)  # it may take as long as a refit
            else:
                yield QUEUE_SECONDS * distance + waited / 2  # who is not next need not see the end at once
            if time.monotonic() - checked > check:
                end_lost()
                checked, check = time.monotonic(), max(check, min(2 * check, MOST_CHECK_SECONDS))

    def _end_lost(self, number: int, worker: Worker) -> None:
        """End the tickets before this one whose workers are gone, or that a call created whose answer was lost."""
        running = self._storage.get_all_trials(self._id, deepcopy=False, states=(TrialState.RUNNING,))
        before = {trial_id_of(trial): trial.user_attrs[WORKER]["id"] for trial in running if trial.number < number}
        living = self._workers.living(before.values()) - {worker.id}
        for trial_id, name in before.items():
            if name not in living:
                _end(self._storage, trial_id, TrialState.FAIL)
