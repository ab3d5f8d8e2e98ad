"""The state of successive halving, read from the trials of an Optuna study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.pruning.halving import Halving
from lightning_bge.hpo.trials import PAUSED_AT, is_attempt, parameter_set_of

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


class AshaTrials:
    """What each parameter set has at the rungs, its last trial, and the state of successive halving.

    Args:
        steps: the rungs' steps, ascending.
        reduction_factor: of the parameter sets that reach a rung, one in this many trains on.
        sign: 1 where a higher score is better, else -1.

    Attributes:
        standings: of each parameter set the values at the rungs that it has reached (`rung_values`); failed trials are
            left out.
        last: the last trial of each parameter set. One that is not paused cannot be resumed: it runs, is complete,
            ended in another way, or failed.
        halving: the state that the trials have led to.
    """

    def __init__(self, steps: Sequence[int], reduction_factor: int, sign: float) -> None:
        self.steps, self.sign = tuple(steps), sign
        self.standings: dict[int, dict[int, float]] = {}
        self.last: dict[int, FrozenTrial] = {}
        self.halving = Halving(len(self.steps), reduction_factor)

    def add(self, trials: Iterable[FrozenTrial]) -> None:
        """Add trials, in their order."""
        for trial in trials:
            if not is_attempt(trial):
                continue
            number = parameter_set_of(trial)
            before, self.last[number] = self.last.get(number), trial
            if before is not None and is_paused(before):
                self.halving.resume(number)
            if trial.state == TrialState.COMPLETE:
                self.halving.complete()
            if trial.state != TrialState.FAIL:
                self._add_values(number, rung_values(trial, self.steps, self.sign))
            if is_paused(trial):
                self.halving.pause(number)

    def _add_values(self, number: int, values: Mapping[int, float]) -> None:
        known = self.standings.get(number, {})
        for rung, value in values.items():
            if rung not in known:  # one that continues another has taken over its values
                self.halving.add(number, rung, value, paused=False)
        if values:
            self.standings[number] = {**known, **values}

    def copy(self) -> AshaTrials:
        """The same, to be added to independently."""
        found = AshaTrials(self.steps, self.halving.reduction_factor, self.sign)
        found.standings, found.last, found.halving = dict(self.standings), dict(self.last), self.halving.copy()
        return found

    def without(self, number: int) -> Halving:
        """The state without a parameter set."""
        if number in self.standings:
            self.halving.remove(number, self.standings[number])
        return self.halving

    @property
    def paused(self) -> set[int]:
        """Parameter sets whose last trial has paused."""
        return {number for number, trial in self.last.items() if is_paused(trial)}


def is_paused(trial: FrozenTrial) -> bool:
    """Whether a trial has paused, and can be resumed."""
    return trial.state == TrialState.PRUNED and PAUSED_AT in trial.user_attrs
