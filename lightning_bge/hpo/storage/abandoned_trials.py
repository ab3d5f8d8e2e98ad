"""Trials whose process is gone: they are ended as FAIL, and their parameters are queued to be tried once more.

Optuna's heartbeat exists for databases only, and a trial that stays RUNNING for good is one whose neighborhood TPE goes
on penalizing.
"""

import logging

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.storage.workers import death_of, this_worker
from lightning_bge.runtime.compat.optuna import storage_of, trial_id_of

log = logging.getLogger("lightning_bge")

# user attributes that say what a trial is to do, besides its parameters: its retry has them too
TASK = ("replicate_of", "seed", "resumes", "parameter_set", "settled_rungs")


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
