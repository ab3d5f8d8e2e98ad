"""The processes that work on a study, how others see that they live, and the trials of those that are gone.

A trial that stays RUNNING for good is one whose neighborhood TPE goes on penalizing. Optuna's heartbeat exists for
databases only.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.storage.journal import boot_id
from lightning_bge.hpo.trials import (
    COMPUTED_WITH,
    ERROR,
    NOT_TRAINED,
    PAUSED_AT,
    WORKER,
    WORKER_LOST,
    attempts,
    deaths_in_a_row,
    parameter_set_of,
)
from lightning_bge.runtime.compat.optuna import storage_of, trial_id_of
from lightning_bge.runtime.run_folder import create_run_dir

log = logging.getLogger("lightning_bge")

WORKERS = "workers"  # folder in the run folder
# A trial without a mark was begun by another program, which may mark or end it yet: ours are created with their mark.
UNMARKED_SECONDS = 60.0
WORKER_TIMEOUT = 60.0  # seconds without a sign of life, after which a worker on another machine counts as gone
BEATS = 6  # signs of life in that time
SLOW_SECONDS = 2.0  # what takes longer was an outage: nobody could give a sign meanwhile


def kernel_id() -> str:
    """What the workers have in common whose locks this process can see: the start of the kernel, else the host."""
    return (boot_id() or socket.gethostname())[:8].replace("-", "_")


class Worker:
    """A process that works on a study, and shows that it lives.

    As long as it lives it holds the lock on a file of its own in the run folder. The kernel frees the lock when the
    process ends, however it ends, so that processes under the same kernel know at once. For all others a thread gives
    a sign of life every ten seconds or so; without one for a minute the worker counts as gone.

    Args:
        run_dir: the run's folder.
        workers: where the signs of life are given; None: in the run folder.

    Attributes:
        id: unique, and the name of the file.
        other_versions: what it computes with, where that differs from the study's first process.
    """

    def __init__(self, run_dir: Path, workers: Workers | None = None) -> None:
        self.other_versions: dict[str, str] = {}
        self.workers = FolderWorkers(run_dir) if workers is None else workers
        self.id = ""
        self._folder, self._stop = run_dir / WORKERS, threading.Event()
        self._thread: threading.Thread | None = None
        self._counts_as_gone = False
        self._name()

    def _name(self) -> None:
        self.id = f"{socket.gethostname()}-{kernel_id()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._path = self._folder / f"{self.id}.lock"
        self._lock = FileLock(self._path, mode=0o600)

    def __enter__(self) -> Worker:
        create_run_dir(self._folder)
        self._lock.acquire()
        self.workers.add(self)
        self._thread = threading.Thread(target=self._give_signs, name="signs of life", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def leave(self) -> None:
        """Stop being a worker of the study; a second call does nothing."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)  # it may wait for a database that is away
        try:
            self.workers.remove(self)
        finally:
            self._path.unlink(missing_ok=True)
            self._lock.release()

    def _give_signs(self) -> None:
        while not self._stop.wait(self.workers.timeout / BEATS):
            if not self.workers.give_sign(self) and not self._stop.is_set():
                self._counts_as_gone = True
                return

    def renew(self) -> None:
        """Become a new worker where others took this one for gone, as after a suspension of the machine."""
        if not self._counts_as_gone:
            return
        log.warning(
            "this process gave no sign of life for more than %.0f s, so that others have taken over its trial; it goes "
            "on with another one",
            self.workers.timeout,
        )
        self._path.unlink(missing_ok=True)
        self._lock.release()
        self._counts_as_gone = False
        self._name()
        self.__enter__()

    @property
    def record(self) -> dict[str, Any]:
        """What a trial holds of its worker, in the user attribute `worker`."""
        return {"id": self.id, "host": socket.gethostname(), "pid": os.getpid()}

    @property
    def attributes(self) -> dict[str, Any]:
        """The user attributes of a trial that are its worker's."""
        return {WORKER: self.record} | ({COMPUTED_WITH: self.other_versions} if self.other_versions else {})


class Workers(ABC):
    """The workers of a study, as this process sees them.

    Args:
        run_dir: the run's folder.
        timeout: seconds without a sign of life, after which a worker under another kernel counts as gone.
    """

    def __init__(self, run_dir: Path, timeout: float = WORKER_TIMEOUT) -> None:
        self.run_dir, self.timeout = run_dir, timeout
        self._seen: dict[str, tuple[Any, float]] = {}
        self._changed: set[str] = set()

    @abstractmethod
    def add(self, worker: Worker) -> None:
        """A worker begins."""

    @abstractmethod
    def give_sign(self, worker: Worker) -> bool:
        """A worker lives; False: it counts as gone already."""

    @abstractmethod
    def remove(self, worker: Worker) -> None:
        """A worker ends."""

    @abstractmethod
    def living(self, named: Collection[str] = ()) -> set[str]:
        """The ids of those that live, as far as is known.

        Args:
            named: ids that are known from elsewhere, of which this process may not have heard yet.
        """

    def any_surely_lives(self, ids: Collection[str]) -> bool:
        """Whether one of them holds its lock under this kernel, or has given a sign since this process watches it."""
        return any(one in self._changed or self._holds_lock(one) for one in ids)

    def seen_alive(self) -> set[str]:
        """As `living`, for a reader: nothing is changed, and one look has to do."""
        return self.living()

    def forget(self, worker_id: str) -> None:
        """Remove what a worker that is gone has left in the run folder."""
        (self.run_dir / WORKERS / f"{worker_id}.lock").unlink(missing_ok=True)

    def _is_silent(self, worker_id: str, sign: Any) -> bool:
        """Whether a worker's sign has not changed for too long, by the clock of this process alone."""
        now = time.monotonic()
        before, since = self._seen.get(worker_id, (sign, now))
        self._seen[worker_id] = (sign, since if sign == before else now)
        if sign != before:
            self._changed.add(worker_id)
        return sign == before and now - since > self.timeout

    def _holds_lock(self, worker_id: str) -> bool | None:
        """Whether a worker holds its lock; None: it is under another kernel, or its file is elsewhere."""
        path = self.run_dir / WORKERS / f"{worker_id}.lock"
        if not is_under_this_kernel(worker_id) or (file := _identity(path)) is None:
            return None
        lock = FileLock(path, mode=0o600)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):  # held, or on a disk that can't be written, where nothing is known
            return True
        if _identity(path) != file:  # the worker has just ended, and this has made a new file
            path.unlink(missing_ok=True)
        lock.release()
        return False


def _identity(path: Path) -> tuple[int, int] | None:
    """What differs between a file and a later one in its place; None: there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


class FolderWorkers(Workers):
    """Those of a run folder, which several machines may share: a moved folder keeps its workers.

    A file server that was away, and a folder whose listing an NFS client still has from before, are no reason to take
    a worker elsewhere for gone: it has to be silent, or its file missing, for the whole time that is granted.
    """

    _since = -float("inf")  # when the folder last answered after a silence of its own

    def add(self, worker: Worker) -> None:
        """Its lock says all."""

    def give_sign(self, worker: Worker) -> bool:
        """Change the time of its file; False: another process has removed it."""
        try:
            os.utime(self.run_dir / WORKERS / f"{worker.id}.lock")
        except FileNotFoundError:
            return False
        except OSError as error:  # a disk that does not answer now: the next sign tells
            log.warning("no sign of life can be given: %s", error)
        return True

    def remove(self, worker: Worker) -> None:
        """Its file goes with it."""

    def living(self, named: Collection[str] = ()) -> set[str]:
        """Those whose file is locked, or under another kernel changes."""
        begun = time.monotonic()
        ids = {path.stem for path in (self.run_dir / WORKERS).glob("*.lock")}
        signs = {name: self._sign(name) for name in {*ids, *named}}
        if time.monotonic() - begun > SLOW_SECONDS:
            self._since = time.monotonic()
        return {name for name, sign in signs.items() if self._lives(name, sign)}

    def _sign(self, name: str) -> int | None:
        try:
            return (self.run_dir / WORKERS / f"{name}.lock").stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _lives(self, name: str, sign: int | None) -> bool:
        if is_under_this_kernel(name):
            return bool(self._holds_lock(name))
        return not self._is_silent(name, sign) or time.monotonic() - self._since <= self.timeout


def is_under_this_kernel(worker_id: str) -> bool:
    """Whether the locks of a worker are seen by this process."""
    return worker_id.split("-")[-3:][0] == kernel_id()


def loss_of(trial: FrozenTrial, living: Collection[str]) -> str | None:
    """Why the worker of a RUNNING trial is certainly gone; None: it may be at work.

    Args:
        trial: a RUNNING one.
        living: the ids of the workers that live.
    """
    worker = trial.user_attrs.get(WORKER)
    if worker is not None:
        return None if worker["id"] in living else f"process {worker['pid']} on {worker['host']} is gone"
    assert trial.datetime_start is not None
    age = abs((datetime.now() - trial.datetime_start).total_seconds())  # a clock may have been set back
    return f"no process has marked it {age:.0f} s after its start" if age > UNMARKED_SECONDS else None


def losses(running: Sequence[FrozenTrial], workers: Workers) -> dict[int, str]:
    """Why the workers of RUNNING trials are certainly gone, by the number of the trial; `loss_of` for several."""
    living = workers.living({_worker_id(trial) for trial in running} - {""}) if running else set()
    return {trial.number: reason for trial in running if (reason := loss_of(trial, living)) is not None}


def end_lost_trials(study: optuna.Study, workers: Workers, max_worker_deaths: int, idle: str = "") -> list[FrozenTrial]:
    """End the RUNNING trials whose worker is gone. Call it under the lock of the study.

    A trial that was about to pause ends as PRUNED. Any other is FAIL with the reason in the user attribute
    `worker_lost`, and another trial is to continue it; but where its parameter set has cost too many workers, it has
    the user attribute `error` as well. A trial that was created twice, as a database's answer was lost, is left out.

    Args:
        study: the study.
        workers: those that work on it.
        max_worker_deaths: workers that may die in a row at one parameter set, with no report in between.
        idle: the id of a worker that runs no trial, which is this process.

    Returns:
        All trials of the study, as they are then.
    """
    trials, has_ended_one = study.get_trials(deepcopy=False), False
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    lost = losses(running, workers)
    # a worker runs one trial after the other: one before its latest was created by a call whose answer it did not get
    latest = {_worker_id(trial): trial.number for trial in trials}
    for trial in running:
        worker = trial.user_attrs.get(WORKER)
        if worker is not None and (worker["id"] == idle or trial.number < latest[worker["id"]]):
            with suppress(UpdateFinishedTrialError):
                storage_of(study).set_trial_user_attr(trial_id_of(trial), NOT_TRAINED, "it was created twice")
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            has_ended_one = True
            continue
        if (reason := lost.get(trial.number)) is not None:
            with suppress(UpdateFinishedTrialError):  # its process lives after all, and has ended it just now
                _end_lost(study, trial, reason, max_worker_deaths)
            has_ended_one = True
            if worker is not None:
                workers.forget(worker["id"])
    return study.get_trials(deepcopy=False) if has_ended_one else trials


def _worker_id(trial: FrozenTrial) -> str:
    """The id of a trial's worker; empty: it has none."""
    return str(trial.user_attrs.get(WORKER, {}).get("id", ""))


def _end_lost(study: optuna.Study, trial: FrozenTrial, reason: str, max_worker_deaths: int) -> None:
    if PAUSED_AT in trial.user_attrs:
        study.tell(trial.number, state=TrialState.PRUNED, skip_if_finished=True)
        return
    storage, trial_id = storage_of(study), trial_id_of(trial)
    storage.set_trial_user_attr(trial_id, WORKER_LOST, reason)
    tries = attempts(study.get_trials(deepcopy=False))[parameter_set_of(trial)]
    if (deaths := deaths_in_a_row(tries)) >= max_worker_deaths:
        text = f"{deaths} workers died in a row at this parameter set, with no report in between"
        storage.set_trial_user_attr(trial_id, ERROR, text)
        log.error("trial %d: %s; it is not tried once more: %s", trial.number, text, trial.params)
    else:
        log.warning("trial %d: %s; it is to be continued", trial.number, reason)
    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
