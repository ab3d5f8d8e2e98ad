"""The study's journal file, and what to do about trials whose worker has died.

Optuna's heartbeat exists for databases only. Here each trial carries a record of its worker, and a sweep at start ends
the trials whose worker is provably gone: otherwise they stay RUNNING for good, and TPE goes on penalising their
neighbourhood.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.errors import StudyError

_log = logging.getLogger(__name__)

# `mark_alive` follows `ask` within milliseconds; a minute leaves room for a busy disk and the clocks of several hosts
RECORD_GRACE_SECONDS = 60.0
# user attributes that say what a trial is to do, besides its parameters: its retry has them too
TASK = ("replicate_of", "seed", "resumes", "parameter_set", "settled_rungs")


class JournalLock(BaseJournalFileLock):
    """Optuna's lock file, taken under a kernel lock that ends with its holder.

    Optuna waits 30 s for a lock file whose holder was killed. Here the lock file names the kernel (boot id) of its
    holder. All our processes take the kernel lock first, so a lock file of this very kernel found under it has no
    living holder, and is removed at once. Any other lock file (of another host, or of a plain Optuna process such as a
    dashboard) is waited for as Optuna does. Without a boot id (macOS) every lock file is waited for.

    Whoever gets the lock first cuts off a line without its end, which a killed writer or a full disk left: the next
    record would otherwise be appended to it, and both be lost to all readers.

    Args:
        path: The journal; the lock file is `path.lock`, the kernel lock is held on `path.guard`.
    """

    def __init__(self, path: Path) -> None:
        self._journal = path
        self._lock_file = f"{path}.lock"
        self._guard = f"{path}.guard"
        self._inner = JournalFileOpenLock(str(path))
        self._fd: int | None = None

    def acquire(self) -> bool:
        """Wait for the lock; returns True."""
        fd = os.open(self._guard, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            self._remove_stale()
            self._inner.acquire()
            if _boot_id() is not None:
                Path(self._lock_file).write_text(str(_boot_id()))
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        try:
            _cut_unfinished_line(self._journal)
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        """Remove the lock file, then free the kernel lock."""
        fd, self._fd = self._fd, None
        if fd is None:
            raise RuntimeError("release of a lock that is not held")
        try:
            self._inner.release()
        finally:
            os.close(fd)

    def _remove_stale(self) -> None:
        file = Path(self._lock_file)
        if file.is_symlink() or not file.exists():  # plain Optuna's lock is a link to the journal itself
            return
        with contextlib.suppress(FileNotFoundError):  # its owner, being alive, removed it just now
            if file.read_text() == _boot_id():
                _log.warning("%s: its holder was killed; removing it.", file)
                file.unlink()


@contextlib.contextmanager
def _held(lock: BaseJournalFileLock) -> Iterator[None]:
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def open_storage(path: str | os.PathLike[str]) -> JournalStorage:
    """Open or create a journal, after cutting off a last line that a kill or a full disk tore.

    A new file is readable by its owner only (0600); its folder is created. Nothing but the torn line is cut off, and
    the log says so.

    Raises:
        StudyError: A line before the last is corrupt; names the line.
    """
    # absolute: Optuna's own lock of a relative path points nowhere
    journal = Path(path).absolute()
    journal.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(journal, os.O_RDWR | os.O_CREAT, 0o600))
    lock = JournalLock(journal)
    with _held(lock):
        _mend(journal)
    return JournalStorage(JournalFileBackend(str(journal), lock_obj=lock))


def _mend(journal: Path) -> None:
    good = 0
    with journal.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if _is_record(line):
                good += len(line)
                continue
            if file.read(1):
                raise StudyError(
                    f"{journal}: line {number} is not a record of the journal, and more lines follow it. Restore the "
                    f"file from a copy, or delete that line if you accept losing what it says."
                )
    if good < journal.stat().st_size:
        _cut(journal, good)


def _cut_unfinished_line(journal: Path) -> None:
    if not journal.exists() or not journal.stat().st_size:
        return
    with journal.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
        file.seek(0)
        good = file.read().rfind(b"\n") + 1
    _cut(journal, good)


def _cut(journal: Path, size: int) -> None:
    with journal.open("r+b") as file:
        _log.warning("%s: cutting off a torn last line of %d bytes.", journal, file.seek(0, os.SEEK_END) - size)
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


@cache
def _boot_id() -> str | None:
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else None


def _pid_namespace() -> str | None:
    link = Path("/proc/self/ns/pid")
    return os.readlink(link) if link.exists() else None


def _start_time(pid: int) -> str | None:
    """Return when the process began, in some fixed form, or None when there is no such process or it is a zombie."""
    if Path("/proc/self/stat").exists():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        state, *rest = stat.rpartition(")")[2].split()  # the command's name before it may hold spaces and brackets
        return None if state in "ZX" else rest[18]  # field 22 of proc(5), in ticks since boot
    out = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
    ).stdout.split(maxsplit=1)
    return None if not out or out[0].startswith("Z") else out[1].strip()


def mark_alive(trial: optuna.Trial) -> None:
    """Record this process as the trial's worker, in the user attribute `worker`. Call it right after `study.ask()`.

    The record holds host, pid, the process's start time (a recycled pid has another), boot id, and pid namespace (a
    container does not see its neighbours' processes). macOS has neither of the last two, and there the start time comes
    from `ps`, to the second.
    """
    trial.set_user_attr("worker", _this_worker())


def _this_worker() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "start": _start_time(pid),
        "boot": _boot_id(),
        "namespace": _pid_namespace(),
    }


def death_of(trial: FrozenTrial) -> str | None:
    """Return why the worker of a RUNNING trial is certainly gone, or None when that is not certain."""
    worker = trial.user_attrs.get("worker")
    if worker is None:
        assert trial.datetime_start is not None
        age = (datetime.now() - trial.datetime_start).total_seconds()
        return f"no worker recorded {age:.0f} s after its start" if age > RECORD_GRACE_SECONDS else None
    here = _this_worker()
    if worker["host"] != here["host"]:
        return None
    if worker["boot"] != here["boot"]:
        return f"host {worker['host']} was restarted"
    if worker["namespace"] != here["namespace"]:
        return None
    started = _start_time(worker["pid"])
    if started is None:
        return f"process {worker['pid']} is gone"
    return f"process {worker['pid']} is another one now" if started != worker["start"] else None


def sweep(study: optuna.Study, max_retries: int = 2) -> list[FrozenTrial]:
    """End the RUNNING trials whose worker is gone, and queue their parameters again.

    Gone for certain is a worker of this host whose process does not exist any more or is another one, or whose host has
    been restarted since. So machines that share a journal need different host names. A trial without a worker record
    counts as abandoned 60 s after its start, because `mark_alive` directly follows `ask`; whoever runs trials of
    this study by other means must call it too. Workers of other hosts and of other containers cannot be judged from
    here: their trials are left alone and logged.

    A swept trial is FAIL with the reason in the user attribute `swept`. Its retry carries `retry_of` (a trial number)
    and `retries` (how often the point was tried before), and where it repeats or resumes another trial, which one.
    Several processes may sweep at once: the storage lets one of them end a trial, and that one queues the retry.

    Args:
        study: The study to clean.
        max_retries: A point whose worker died once more than this is not queued again: it may be what kills them.

    Returns:
        The trials that this call ended.
    """
    swept = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        reason = death_of(trial)
        if reason is None:
            _log_left_alone(trial)
        elif _fail(study, trial, reason):
            swept.append(trial.number)
            _log.warning("trial %d: %s; ended as FAIL.", trial.number, reason)
            _retry(study, trial, max_retries)
    return [trial for trial in study.get_trials(deepcopy=False) if trial.number in swept]


def enqueue_once(study: optuna.Study, points: Sequence[dict[str, Any]], journal: Path) -> int:
    """Queue the points that this study has never queued before; they are tried before anything is drawn.

    Safe to call by several processes at once and again at each start. What was queued is told by the trials themselves,
    whose user attribute `enqueued` holds the point: a trial that a kill ended is not queued a second time here, as
    `sweep` does that.

    Args:
        study: The study.
        points: Values by the names of parameters; the others are drawn.
        journal: The study's journal; the lock's files lie beside it.

    Returns:
        How many were queued.
    """
    # Looking and queuing are many records of the journal, whose own lock covers one at a time. What remains: a process
    # on another host that keeps this lock for more than 30 s, stopped in the middle, loses it (see `JournalLock`), and
    # points may then be queued twice, which costs a trial each. A process killed in the middle leaves nothing amiss:
    # the next call queues the rest.
    with _held(JournalLock(journal.with_name(f"{journal.name}.enqueue"))):
        known = [trial.user_attrs.get("enqueued") for trial in study.get_trials(deepcopy=False)]
        missing = [point for point in points if point not in known]
        for point in missing:
            study.enqueue_trial(point, user_attrs={"enqueued": point})
    return len(missing)


def abandon(study: optuna.Study, number: int, reason: str, max_retries: int = 2) -> None:
    """End a RUNNING trial of this process that is being left, by Ctrl-C say, and queue its parameters again.

    Args:
        study: The trial's study.
        number: The trial's number.
        reason: Goes into the user attribute `swept`.
        max_retries: As in `sweep`.
    """
    trial = study.get_trials(deepcopy=False)[number]
    if trial.state == TrialState.RUNNING and _fail(study, trial, reason):
        _retry(study, trial, max_retries)


def _log_left_alone(trial: FrozenTrial) -> None:
    worker, here = trial.user_attrs.get("worker"), _this_worker()
    if worker and (worker["host"], worker["namespace"]) != (here["host"], here["namespace"]):
        _log.warning(
            "trial %d is RUNNING on host %s, process %s, which cannot be checked from here. If it is gone for good, "
            "run `study.tell(%d, state=optuna.trial.TrialState.FAIL)`.",
            *(trial.number, worker["host"], worker["pid"], trial.number),
        )


def _fail(study: optuna.Study, trial: FrozenTrial, reason: str) -> bool:
    """End the trial, and return False when another process was faster."""
    try:
        # not `study.tell`: between its check and its write another sweep may end the trial, and its ValueError for
        # that cannot be told from others. The storage refuses the second writer by a type of its own.
        study._storage.set_trial_user_attr(trial._trial_id, "swept", reason)
        study._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False
    return True


def _retry(study: optuna.Study, trial: FrozenTrial, max_retries: int) -> None:
    # a queued trial killed before its first suggestion still has its parameters only in the queue's attribute
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    retries = trial.user_attrs.get("retries", 0) + 1
    if not params:
        return
    if retries > max_retries:
        _log.error("trial %d: its point lost its worker %d times; not tried again: %s", trial.number, retries, params)
        return
    task = {name: trial.user_attrs[name] for name in TASK if name in trial.user_attrs}
    study.enqueue_trial(params, user_attrs={**task, "retry_of": trial.number, "retries": retries})
