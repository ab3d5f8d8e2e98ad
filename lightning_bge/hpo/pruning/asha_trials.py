"""The state of successive halving, read from the trials of an Optuna study."""

from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.pruning.halving import Halving
from lightning_bge.hpo.trials import PAUSED_AT, any_complete, attempts, parameter_set_of

SETTLED_RUNGS = "settled_rungs"  # attribute of a trial: how many rungs it has passed, at which it is not asked any more


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
    halving, paused = Halving(len(steps), reduction_factor), paused_parameter_sets(trials)
    for parameter_set, values in standings(trials, steps, sign).items():
        if parameter_set != without:
            for rung, value in values.items():
                halving.add(parameter_set, rung, value, paused=rung == max(values) and parameter_set in paused)
    if any_complete(trials):
        halving.complete()
    return halving


def paused_parameter_sets(trials: Sequence[FrozenTrial]) -> set[int]:
    """Parameter sets whose last trial has paused; others run, are complete, ended for another reason, or failed."""
    return {number for number, tries in attempts(trials).items() if is_paused(tries[-1])}


def is_paused(trial: FrozenTrial) -> bool:
    """Whether a trial has paused, and can be resumed."""
    return trial.state == TrialState.PRUNED and PAUSED_AT in trial.user_attrs
