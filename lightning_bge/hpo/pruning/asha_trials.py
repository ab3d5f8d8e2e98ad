"""How an Optuna study records paused and resumed trials, and the state of successive halving read from its trials.

Optuna cannot reopen a trial. A resumed trial is a new one with the same parameters and the number of the paused trial
in a user attribute. All trials of one parameter set count as one; its number is that of its first trial.
"""

from collections import Counter
from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.pruning.halving import Halving

RESUMES = "resumes"  # user attribute of a resumed trial: the number of the paused trial
PARAMETER_SET = "parameter_set"  # user attribute of a resumed trial: the number of its parameter set's first trial
PAUSED_AT = "paused_at"  # user attribute of a paused trial: the step
SETTLED_RUNGS = "settled_rungs"  # attribute of a trial: how many rungs it has passed, at which it is not asked any more
ATTEMPTS = 3  # to resume a parameter set whose process dies or fails each time


def parameter_set_of(trial: FrozenTrial) -> int:
    """The number of the first trial that has a trial's parameter set."""
    return int(trial.user_attrs.get(PARAMETER_SET, trial.number))


def rung_values(trial: FrozenTrial, steps: Sequence[int], sign: float) -> dict[int, float]:
    """What a trial has at each rung that it has reached, from 0; higher is better.

    Args:
        trial: the trial.
        steps: the rungs' steps, ascending.
        sign: 1 where a higher score is better, else -1.
    """
    values = trial.intermediate_values
    return {rung: sign * values[step] for rung, step in enumerate(steps) if step in values}


def standings(trials: Sequence[FrozenTrial], steps: Sequence[int], sign: float) -> dict[int, dict[int, float]]:
    """What each parameter set has at each rung that it has reached, as in `rung_values`; failed trials are left out."""
    found: dict[int, dict[int, float]] = {}
    for trial in trials:
        if trial.state != TrialState.FAIL and (values := rung_values(trial, steps, sign)):
            found.setdefault(parameter_set_of(trial), {}).update(values)
    return found


def read_halving(
    trials: Sequence[FrozenTrial],
    steps: Sequence[int],
    reduction_factor: int,
    sign: float,
    *,
    without: int | None = None,
) -> Halving:
    """The state of successive halving that a study's trials have led to.

    Args:
        trials: all trials of the study.
        steps: the rungs' steps, ascending.
        reduction_factor: of the parameter sets that reach a rung, one in this many trains on.
        sign: 1 where a higher score is better, else -1.
        without: the number of a parameter set that is left out.
    """
    halving, busy = Halving(len(steps), reduction_factor), not_resumable(trials)
    for parameter_set, values in standings(trials, steps, sign).items():
        if parameter_set != without:
            for rung, value in values.items():
                halving.add(parameter_set, rung, value, paused=rung == max(values) and parameter_set not in busy)
    if any_complete(trials):
        halving.complete()
    return halving


def not_resumable(trials: Sequence[FrozenTrial]) -> set[int]:
    """Parameter sets that cannot be resumed.

    They run, wait, are complete, ended by an out-of-memory error or a NaN, or failed too often after they were resumed.
    """
    found = {
        parameter_set
        for parameter_set, latest in latest_trials(trials).items()
        if latest.state != TrialState.PRUNED or PAUSED_AT not in latest.user_attrs
    }
    failed = Counter(
        parameter_set_of(trial)
        for trial in trials
        if trial.state == TrialState.FAIL
        and RESUMES in trial.user_attrs
        and not str(trial.user_attrs.get("swept", "")).startswith("interrupted")
    )
    return found | {parameter_set for parameter_set, times in failed.items() if times >= ATTEMPTS}


def latest_trials(trials: Sequence[FrozenTrial]) -> dict[int, FrozenTrial]:
    """Each parameter set's last trial that did not fail."""
    return {parameter_set_of(trial): trial for trial in trials if trial.state != TrialState.FAIL}


def any_complete(trials: Sequence[FrozenTrial]) -> bool:
    """Whether any trial ran to its end."""
    return any(trial.state == TrialState.COMPLETE for trial in trials)


def resumed_numbers(trials: Sequence[FrozenTrial]) -> set[int]:
    """The numbers of paused trials that were resumed, or are queued to be resumed."""
    return {trial.user_attrs[RESUMES] for trial in trials if RESUMES in trial.user_attrs}


def ended_parameter_sets(trials: Sequence[FrozenTrial]) -> int:
    """How many parameter sets have a first trial that has ended: complete, pruned or paused."""
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    return sum(trial.state in ended and RESUMES not in trial.user_attrs for trial in trials)


def any_queued(trials: Sequence[FrozenTrial]) -> bool:
    """Whether a trial that resumes a paused one is queued."""
    return any(trial.state == TrialState.WAITING and RESUMES in trial.user_attrs for trial in trials)


def resume(study: optuna.Study, paused: FrozenTrial, steps: Sequence[int]) -> None:
    """Queue a trial that resumes a paused one.

    Args:
        study: the study of the paused trial.
        paused: the trial, with the user attribute `paused_at`.
        steps: the rungs' steps.
    """
    settled = sum(step <= paused.user_attrs[PAUSED_AT] for step in steps)
    attributes = {RESUMES: paused.number, PARAMETER_SET: parameter_set_of(paused), SETTLED_RUNGS: settled}
    study.enqueue_trial(paused.params, user_attrs=attributes)
