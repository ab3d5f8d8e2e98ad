"""The processes that work on a study, and the trials of those that are gone.

Optuna's heartbeat exists for databases only, and a trial that stays RUNNING for good is one whose neighborhood TPE
goes on penalizing.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.trials import (
    COMPUTED_WITH,
    ERROR,
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


class Worker:
    """A process that works on a study: as long as it lives it holds the lock on a file of its own.

    The kernel frees the lock when the process ends, however it ends, so that others know at once. They look in their
    own run folder: a moved folder keeps its workers, and a copied one has none. Machines that share a folder need a
    file system whose locks hold between machines, such as NFS 4.

    Args:
        run_dir: the run's folder.

    Attributes:
        id: unique, and the name of the file.
        other_versions: what it computes with, where that differs from the study's first process.
    """

    def __init__(self, run_dir: Path) -> None:
        self.other_versions: dict[str, str] = {}
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._path = _lock_file(run_dir, self.id)
        self._lock = FileLock(self._path, mode=0o600)

    def __enter__(self) -> Worker:
        create_run_dir(self._path.parent)
        self._lock.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._path.unlink(missing_ok=True)
        self._lock.release()

    @property
    def record(self) -> dict[str, Any]:
        """What a trial holds of its worker, in the user attribute `worker`."""
        return {"id": self.id, "host": socket.gethostname(), "pid": os.getpid()}

    @property
    def attributes(self) -> dict[str, Any]:
        """The user attributes of a trial that are its worker's."""
        return {WORKER: self.record} | ({COMPUTED_WITH: self.other_versions} if self.other_versions else {})


def _lock_file(run_dir: Path, worker_id: str) -> Path:
    return run_dir / WORKERS / f"{worker_id}.lock"


def is_alive(run_dir: Path, worker_id: str) -> bool:
    """Whether a worker of the study in this folder still lives."""
    path = _lock_file(run_dir, worker_id)
    if not path.exists():
        return False
    lock = FileLock(path, mode=0o600)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):  # held, or on a disk that can't be written, where nothing is known
        return True
    lock.release()
    return False


def living_workers(run_dir: Path) -> set[str]:
    """The ids of all workers of the study in this folder that still live."""
    names = {path.stem for path in (run_dir / WORKERS).glob("*.lock")}
    return {name for name in names if is_alive(run_dir, name)}


def loss_of(trial: FrozenTrial, run_dir: Path) -> str | None:
    """Why the worker of a RUNNING trial is certainly gone; None: it may be at work."""
    worker = trial.user_attrs.get(WORKER)
    if worker is not None:
        return None if is_alive(run_dir, worker["id"]) else f"process {worker['pid']} on {worker['host']} is gone"
    assert trial.datetime_start is not None
    age = abs((datetime.now() - trial.datetime_start).total_seconds())  # a clock may have been set back
    return f"no process has marked it {age:.0f} s after its start" if age > UNMARKED_SECONDS else None


def end_lost_trials(study: optuna.Study, run_dir: Path, max_worker_deaths: int) -> None:
    """End the RUNNING trials whose worker is gone. Call it under the lock of the study.

    A trial that was about to pause ends as PRUNED. Any other is FAIL with the reason in the user attribute
    `worker_lost`, and another trial is to continue it; but where its parameter set has cost too many workers, it has
    the user attribute `error` as well.

    Args:
        study: the study.
        run_dir: the run's folder.
        max_worker_deaths: workers that may die in a row at one parameter set, with no report in between.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        reason = loss_of(trial, run_dir)
        if reason is None:
            continue
        if WORKER in trial.user_attrs:
            _lock_file(run_dir, trial.user_attrs[WORKER]["id"]).unlink(missing_ok=True)
        if PAUSED_AT in trial.user_attrs:
            study.tell(trial.number, state=TrialState.PRUNED)
            continue
        storage, trial_id = storage_of(study), trial_id_of(trial)
        storage.set_trial_user_attr(trial_id, WORKER_LOST, reason)
        tries = attempts(study.get_trials(deepcopy=False))[parameter_set_of(trial)]
        if (deaths := deaths_in_a_row(tries)) >= max_worker_deaths:
            text = f"{deaths} workers died in a row at this parameter set, with no report in between"
            storage.set_trial_user_attr(trial_id, ERROR, text)
            log.error("trial %d: %s; it is not tried once more: %s", trial.number, text, trial.params)
        else:
            log.warning("trial %d: %s; it is to be continued", trial.number, reason)
        study.tell(trial.number, state=TrialState.FAIL)
