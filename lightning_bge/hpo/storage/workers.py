"""The record that a trial carries of the process that runs it, and whether that process is still alive."""

import os
import socket
import subprocess
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

# `mark_alive` follows `ask` within milliseconds; a minute leaves room for a busy disk and the clocks of several hosts
RECORD_GRACE_SECONDS = 60.0


@cache
def boot_id() -> str | None:
    """Which start of the kernel this is; None where the system does not tell (macOS, Windows)."""
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
    trial.set_user_attr("worker", this_worker())


def this_worker() -> dict[str, Any]:
    """The record of this process."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "start": _start_time(pid),
        "boot": boot_id(),
        "namespace": _pid_namespace(),
    }


def death_of(trial: FrozenTrial) -> str | None:
    """Return why the worker of a RUNNING trial is certainly gone, or None when that is not certain."""
    worker = trial.user_attrs.get("worker")
    if worker is None:
        assert trial.datetime_start is not None
        age = (datetime.now() - trial.datetime_start).total_seconds()
        return f"no worker recorded {age:.0f} s after its start" if age > RECORD_GRACE_SECONDS else None
    here = this_worker()
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
