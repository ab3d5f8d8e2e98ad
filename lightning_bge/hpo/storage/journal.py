"""The study's journal file: opened, repaired, and locked so that a killed process does not stall the others."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import filelock
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from lightning_bge.errors import StudyError

log = logging.getLogger("lightning_bge")

JOURNAL = "journal.log"  # file in the run folder
POLL_SECONDS = 0.002  # between two tries to get the kernel's lock; a record of the journal takes about as long


@cache
def boot_id() -> str | None:
    """Which start of the kernel this is; None where the system does not tell (macOS, Windows)."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else None


class JournalLock(JournalFileOpenLock):
    """Optuna's lock file, taken under a kernel lock that ends with its holder.

    Optuna waits 30 s for a lock file whose holder was killed. Here the lock file holds the boot id of its holder's
    kernel. All processes of this package take the kernel lock first, so that a lock file with this kernel's boot id
    that is found under it has no living holder, and is removed at once. Any other lock file (of another host, or of a
    plain Optuna process such as a dashboard) is waited for as Optuna does. Without a boot id (macOS, Windows) every
    lock file is waited for.

    Whoever gets the lock first cuts off a last line without its end, which a killed writer or a full disk left: the
    next record would otherwise be appended to it, and both be lost to all readers.

    Args:
        path: the journal; the lock file is `path.lock`, the kernel lock is held on `path.guard`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._journal, self._file = path, Path(f"{path}.lock")
        self._guard = filelock.FileLock(f"{path}.guard", mode=0o600)

    def acquire(self) -> bool:
        """Wait for the lock; returns True."""
        self._guard.acquire(poll_interval=POLL_SECONDS)
        try:
            self._remove_stale()
            super().acquire()
            if boot_id() is not None:
                self._file.write_text(str(boot_id()))
        except BaseException:
            self._guard.release()
            raise
        try:
            _cut_unfinished_line(self._journal)
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        """Remove the lock file, then free the kernel lock.

        Raises:
            RuntimeError: the lock is not held.
        """
        if not self._guard.is_locked:
            raise RuntimeError("release of a lock that is not held")
        try:
            super().release()
        finally:
            self._guard.release()

    def _remove_stale(self) -> None:
        if self._file.is_symlink() or not self._file.exists():  # plain Optuna's lock is a link to the journal itself
            return
        with contextlib.suppress(FileNotFoundError):  # its living owner removed it just now
            if self._file.read_text() == boot_id():
                log.warning("%s: its holder was killed; removing it.", self._file)
                self._file.unlink()


@contextlib.contextmanager
def hold(lock: JournalLock) -> Iterator[None]:
    """Hold a lock for a `with` block."""
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def open_storage(path: str | os.PathLike[str]) -> JournalStorage:
    """Open or create a journal, after cutting off a last line that a kill or a full disk tore.

    A new file is readable by its owner only (0600); its folder is created. Nothing but the torn line is cut off, with a
    warning.

    Raises:
        StudyError: A line before the last is corrupt; names the line.
    """
    # absolute: Optuna's own lock of a relative path points nowhere
    journal = Path(path).absolute()
    journal.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(journal, os.O_RDWR | os.O_CREAT, 0o600))
    lock = JournalLock(journal)
    with hold(lock):
        _repair(journal)
    return JournalStorage(JournalFileBackend(str(journal), lock_obj=lock))


def _repair(journal: Path) -> None:
    intact = 0
    with journal.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if _is_record(line):
                intact += len(line)
                continue
            if file.read(1):
                raise StudyError(
                    f"{journal}: line {number} is not a record of the journal, and more lines follow it. Restore the "
                    f"file from a copy, or delete that line if you accept losing what it says."
                )
    if intact < journal.stat().st_size:
        _cut(journal, intact)


def _cut_unfinished_line(journal: Path) -> None:
    if not journal.exists() or not journal.stat().st_size:
        return
    with journal.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
        file.seek(0)
        intact = file.read().rfind(b"\n") + 1
    _cut(journal, intact)


def _cut(journal: Path, size: int) -> None:
    with journal.open("r+b") as file:
        log.warning("%s: cutting off a torn last line of %d bytes.", journal, file.seek(0, os.SEEK_END) - size)
        file.truncate(size)
        os.fsync(file.fileno())


def _is_record(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        record = json.loads(line)
    except ValueError:  # JSON and UTF-8 errors alike
        return False
    return isinstance(record, dict) and "op_code" in record
