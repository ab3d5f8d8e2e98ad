"""What the trials of a study are to each other: the attempts at one parameter set, and how each of them ended.

Optuna cannot reopen a trial. One that continues another, which was paused or whose process died, is a new trial with
the same parameters. All of them are attempts at one parameter set, whose number is that of its first trial.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

N_TRIALS = "n_trials"  # attribute of a study: what the last call has asked for, which all processes follow
# user attributes of trials
PARAMETER_SET = "parameter_set"  # of a trial that continues others: the number of its parameter set's first trial
RESUMES = "resumes"  # of a trial that continues a paused one, and of its retries: the number of the paused trial
RETRY_OF = "retry_of"  # of a trial that continues one whose process is gone: its number
REPORTS_BEFORE = "reports_before"  # of a trial that continues another one: how many reports it took over
PAUSED_AT = "paused_at"  # of a paused trial: the step
ENQUEUED = "enqueued"  # the values of `hpo.enqueue` that this trial was begun for
WORKER = "worker"  # the process that runs the trial
# of a study: the versions and the device of its first process; of a trial: those of its process that differ from them
COMPUTED_WITH = "computed_with"
WORKER_LOST = "worker_lost"  # of a failed trial: why its process is known to be gone
INTERRUPTED = "interrupted"  # of a failed trial: why its process stopped it
ERROR = "error"  # of a failed trial: why its parameter set is not tried once more
NOT_TRAINED = "not_trained"  # of a failed trial that stands for no parameter set of the study: why

FAILURES = "failures"  # folder in the run folder: the tracebacks of failed trials

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


def parameter_set_of(trial: FrozenTrial) -> int:
    """The number of the first trial that has a trial's parameter set."""
    found: int = trial.user_attrs.get(PARAMETER_SET, trial.number)
    return found


def attempts(trials: Sequence[FrozenTrial]) -> dict[int, list[FrozenTrial]]:
    """The trials of each parameter set, the oldest first."""
    found: dict[int, list[FrozenTrial]] = {}
    for trial in trials:
        if is_attempt(trial):
            found.setdefault(parameter_set_of(trial), []).append(trial)
    return found


def is_attempt(trial: FrozenTrial) -> bool:
    """Whether a trial stands for a parameter set of the study: it does not wait, and was or is trained."""
    return trial.state != TrialState.WAITING and NOT_TRAINED not in trial.user_attrs


def has_failed(tries: Sequence[FrozenTrial]) -> bool:
    """Whether a parameter set is not tried once more, as it ended with an error or cost too many workers."""
    return tries[-1].state == TrialState.FAIL and not is_to_be_continued(tries)


def is_to_be_continued(tries: Sequence[FrozenTrial]) -> bool:
    """Whether the last attempt at a parameter set did not end by itself: its process is gone, or was interrupted."""
    last = tries[-1]
    stopped = WORKER_LOST in last.user_attrs or INTERRUPTED in last.user_attrs
    return last.state == TrialState.FAIL and stopped and ERROR not in last.user_attrs


def deaths_in_a_row(tries: Sequence[FrozenTrial]) -> int:
    """How many workers have died at a parameter set since it last reported; interruptions do not count."""
    deaths = 0
    for trial in reversed(tries):
        made = len(trial.intermediate_values) > trial.user_attrs.get(REPORTS_BEFORE, 0)
        interrupted = INTERRUPTED in trial.user_attrs
        if made or not (interrupted or WORKER_LOST in trial.user_attrs):
            break
        deaths += not interrupted
    return deaths


def latest_trials(trials: Sequence[FrozenTrial]) -> dict[int, FrozenTrial]:
    """Each parameter set's last trial that did not fail."""
    return {parameter_set_of(trial): trial for trial in trials if trial.state != TrialState.FAIL}


def ended_parameter_sets(trials: Sequence[FrozenTrial]) -> int:
    """How many parameter sets have a trial that has ended: complete, pruned or paused."""
    return len({parameter_set_of(trial) for trial in trials if trial.state in ENDED})


def any_complete(trials: Sequence[FrozenTrial]) -> bool:
    """Whether any trial ran to its end."""
    return any(trial.state == TrialState.COMPLETE for trial in trials)


def resumed_numbers(trials: Sequence[FrozenTrial]) -> set[int]:
    """The numbers of paused trials that were resumed."""
    return {trial.user_attrs[RESUMES] for trial in trials if RESUMES in trial.user_attrs}


def one_trial_each(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """One trial of each parameter set, for a sampler: the last that has ended, else the one that runs.

    A paused trial stands for its parameter set until the one that continues it has ended: its value says more than that
    the other one runs. Failed parameter sets are left out, as Optuna's samplers leave them out.
    """
    found: dict[int, FrozenTrial] = {}
    for trial in trials:
        if trial.state in ENDED or (trial.state == TrialState.RUNNING and parameter_set_of(trial) not in found):
            found[parameter_set_of(trial)] = trial
    return sorted(found.values(), key=lambda trial: trial.number)


def key_of(params: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """A key by which equal parameter sets are found: true is not 1, and numbers are equal to 12 digits."""
    return tuple(sorted((name, _key_of(value)) for name, value in params.items()))


def _key_of(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, int | float) and not isinstance(value, bool) else repr(value)
