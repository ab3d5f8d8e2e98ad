"""The record that a trial carries of the process that runs it, and what is done about trials whose process is gone.

They are ended as FAIL, and their parameters are queued to be tried once more. Optuna's heartbeat exists for databases
only, and a trial that stays RUNNING for good is one whose neighborhood TPE goes on penalizing.
"""

import logging
import os
import socket
import subprocess
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.runtime.compat.optuna import storage_of, trial_id_of

log = logging.getLogger("lightning_bge")

# `mark_alive` follows `ask` within milliseconds; a minute leaves room for a busy disk and the clocks of several hosts
RECORD_GRACE_SECONDS = 60.0
# user attributes that say what a trial is to do, besides its parameters: its retry has them too
TASK = ("replicate_of", "seed", "resumes", "parameter_set", "settled_rungs")


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


def sweep(study: optuna.Study, max_retries: int = 2) -> list[FrozenTrial]:
    """End the RUNNING trials whose worker is gone, and queue their parameters once more.

    Gone for certain is a worker of this host whose process does not exist any more or is another one, or whose host has
    been restarted since. So machines that share a journal need different host names. A trial without a worker record
    counts as abandoned 60 s after its start, because `mark_alive` directly follows `ask`; whoever runs trials of
    this study by other means must call it too. Workers of other hosts and of other containers cannot be judged from
    here: their trials are left alone and logged.

    A swept trial is FAIL with the reason in the user attribute `swept`. Its retry carries `retry_of` (a trial number)
    and `retries` (how often its parameters were tried before), and if the swept trial was to resume another trial or to
    replicate it with another seed, so does the retry.
    Several processes may sweep at once: the storage lets one of them end a trial, and that one queues the retry.

    Args:
        study: the study.
        max_retries: parameters whose worker died more often than this are not queued: they may be what kills it.

    Returns:
        The trials that this call has ended.
    """
    swept = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        reason = death_of(trial)
        if reason is None:
            _warn_of_unknown(trial)
        elif _fail(study, trial, reason):
            swept.append(trial.number)
            log.warning("trial %d: %s; ended as FAIL.", trial.number, reason)
            _retry(study, trial, max_retries)
    return [trial for trial in study.get_trials(deepcopy=False) if trial.number in swept]


def abandon(study: optuna.Study, number: int, reason: str, max_retries: int = 2) -> None:
    """End a RUNNING trial of this process that is interrupted, and queue its parameters once more.

    Args:
        study: the trial's study.
        number: the trial's number.
        reason: goes into the user attribute `swept`.
        max_retries: as in `sweep`.
    """
    trial = study.get_trials(deepcopy=False)[number]
    if trial.state == TrialState.RUNNING and _fail(study, trial, reason):
        _retry(study, trial, max_retries)


def _warn_of_unknown(trial: FrozenTrial) -> None:
    worker, here = trial.user_attrs.get("worker"), this_worker()
    if worker and (worker["host"], worker["namespace"]) != (here["host"], here["namespace"]):
        log.warning(
            "trial %d is RUNNING on host %s, process %s, which cannot be checked from here. If it is gone for good, "
            "run `study.tell(%d, state=optuna.trial.TrialState.FAIL)`.",
            *(trial.number, worker["host"], worker["pid"], trial.number),
        )


def _fail(study: optuna.Study, trial: FrozenTrial, reason: str) -> bool:
    """End the trial, and return False when another process was faster."""
    try:
        # not `study.tell`: between its check and its write another sweep may end the trial, and its ValueError for
        # that cannot be told from others. The storage refuses the second writer by a type of its own.
        storage, trial_id = storage_of(study), trial_id_of(trial)
        storage.set_trial_user_attr(trial_id, "swept", reason)
        storage.set_trial_state_values(trial_id, state=TrialState.FAIL)
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
        log.error("trial %d: its worker died, %d times by now; not tried once more: %s", trial.number, retries, params)
        return
    task = {name: trial.user_attrs[name] for name in TASK if name in trial.user_attrs}
    study.enqueue_trial(params, user_attrs={**task, "retry_of": trial.number, "retries": retries})
