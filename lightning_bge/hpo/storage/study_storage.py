"""Where a study is kept: the journal in its run folder, or a storage that machines share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from filelock import FileLock, Timeout
from optuna.storages import BaseStorage

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.storage.database import open_shared_storage
from lightning_bge.hpo.storage.journal import JOURNAL, open_storage
from lightning_bge.hpo.storage.retrying import RetryingStorage
from lightning_bge.hpo.storage.shared import StorageWorkers, TicketLock
from lightning_bge.hpo.storage.url import parse_storage
from lightning_bge.hpo.storage.workers import WORKER_TIMEOUT, FolderWorkers, Worker, Workers
from lightning_bge.runtime.stop import Stopped

LOCK, END_LOCK = "study.lock", "end.lock"  # files in the run folder, and the kinds of locks in a shared storage
LOCK_POLL_SECONDS = 0.01  # between two tries to get the lock; a decision takes a few times as long
STOP_POLL_SECONDS = 0.5  # between two looks of those who wait for it at whether they are to stop
BESIDE = re.compile(r"-(workers|locks|locks-end|baseline|seed-replicates|space-\d+)$")
MOST_CHARACTERS = 400  # of a study's name: a database takes 512, with what is added for what is kept beside it
PATIENCE = 600.0  # seconds for which a database that is away is waited for


@dataclass(frozen=True)
class StudyStorage:
    """Where a study is kept.

    Attributes:
        run_dir: the run's folder on this machine.
        storage: with the study in it.
        workers: those that work on the study.
        name: of the study in a storage that holds others too; None: the storage is the run's own.
    """

    run_dir: Path
    storage: BaseStorage
    workers: Workers
    name: str | None = None

    @property
    def shown(self) -> str:
        """The study in a message: its folder, or its name and its storage."""
        if self.name is None:
            return str(self.run_dir)
        assert isinstance(self.storage, RetryingStorage)
        return f"the study {self.name} in {self.storage.retries.name}"

    def worker(self) -> Worker:
        """A worker that this process may become."""
        return Worker(self.run_dir, self.workers)

    @contextmanager
    def lock(
        self, worker: Worker | None = None, when_near: Callable[[], object] = bool
    ) -> Iterator[Callable[[], bool]]:
        """Hold the lock under which a process decides what it runs.

        The `with` block gets a function that tells whether the lock is still held. It is not where this process gave no
        sign of life for too long, as others have taken it over then: what was decided does not hold.

        Args:
            worker: this process; None: it becomes a worker for this time.
            when_near: called where a process waits for the lock of a shared storage, and few are before it: what it
                reads then, it need not read while others wait.
        """
        with self._lock(LOCK, worker, when_near=when_near) as is_held:
            yield is_held

    @contextmanager
    def end_lock(self, worker: Worker, is_stopping: Callable[[], object] = bool) -> Iterator[Callable[[], bool]]:
        """Hold the lock under which one process ends the study. Others wait as long as that takes, such as a refit.

        The `with` block gets a function that tells whether the lock is still held, as in `lock`.

        Args:
            worker: this process.
            is_stopping: whether this process is to stop; by default it never is.

        Raises:
            Stopped: it is to stop, and another process holds the lock.
        """
        with self._lock(END_LOCK, worker, is_stopping) as is_held:
            yield is_held

    @contextmanager
    def _lock(
        self,
        kind: str,
        worker: Worker | None,
        is_stopping: Callable[[], object] = bool,
        when_near: Callable[[], object] = bool,
    ) -> Iterator[Callable[[], bool]]:
        if self.name is None:
            with _take(FileLock(self.run_dir / kind, mode=0o600), is_stopping):
                yield lambda: True
        elif worker is None:
            with self.worker() as temporary, self._lock(kind, temporary, is_stopping, when_near) as is_held:
                yield is_held
        else:
            with self._ticket_locks[kind].hold(worker, is_stopping, when_near) as is_held:
                yield is_held

    @cached_property
    def _ticket_locks(self) -> dict[str, TicketLock]:
        assert isinstance(self.storage, RetryingStorage)
        assert self.name is not None
        names = {LOCK: f"{self.name}-locks", END_LOCK: f"{self.name}-locks-end"}
        return {kind: TicketLock(self.storage, name, self.workers) for kind, name in names.items()}

    def stop_when(self, is_stopping: Callable[[], object]) -> None:
        """Wait only for a few seconds for a storage that is away, once the process is to stop."""
        if isinstance(self.storage, RetryingStorage):
            self.storage.retries.is_stopping = is_stopping


def check_study_name(option: str, name: str) -> None:
    """Raise `ConfigError` where a name is empty, too long, a path, or may be that of what is kept beside a study."""
    if len(name) > MOST_CHARACTERS:
        raise ConfigError(f"{option}: expected at most {MOST_CHARACTERS} characters, got {len(name)}")
    if not name.strip() or "/" in name or BESIDE.search(name):
        raise ConfigError(
            f"{option}: expected a name without / that does not end in -workers, -locks, -locks-end, -baseline, "
            f"-seed-replicates or -space-NUMBER, as what is kept beside a study has such names, got {name!r}"
        )


def _take(lock: FileLock, is_stopping: Callable[[], object]) -> AbstractContextManager[object]:
    """Take a lock; `Stopped` where this process is to stop before it is free."""
    while True:
        try:
            return lock.acquire(timeout=STOP_POLL_SECONDS, poll_interval=LOCK_POLL_SECONDS)
        except Timeout:
            if is_stopping():
                raise Stopped from None


def open_study_storage(
    run_dir: Path,
    url: str | None = None,
    name: str | None = None,
    *,
    patience: float = PATIENCE,
    worker_timeout: float = WORKER_TIMEOUT,
    waits: bool = False,
    option: str = "hpo.storage",
) -> StudyStorage:
    """Open where a study is kept, or create it.

    Args:
        run_dir: the run's folder.
        url: of a storage that machines share; None: the journal in the run folder.
        name: of the study in it; None: that of the run folder.
        patience: seconds for which a storage that does not answer is waited for.
        worker_timeout: seconds without a sign of life, after which a worker elsewhere counts as gone.
        waits: wait also where the storage does not answer from the start.
        option: that named the URL, for messages.

    Raises:
        ConfigError: the URL is wrong, or a package is missing.
        StudyError: the journal is corrupt; or the storage does not answer, refuses the login, or is of another version.
    """
    if url is None:
        return StudyStorage(run_dir, open_storage(run_dir / JOURNAL), FolderWorkers(run_dir, worker_timeout))
    name = name or run_dir.resolve().name
    check_study_name("the name of the study", name)
    storage = open_shared_storage(
        parse_storage(url, option), patience=patience, worker_timeout=worker_timeout, waits=waits
    )
    return StudyStorage(run_dir, storage, StorageWorkers(run_dir, storage, name, worker_timeout), name)
