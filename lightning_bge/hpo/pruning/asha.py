"""Asynchronous successive halving in an Optuna study: a pruner that pauses trials instead of ending them.

Optuna's own halving has to decide for good when a trial reaches a rung, among the few that came before it. Here a trial
that is low among the first ten can still be resumed when it is high among a hundred.
"""

import itertools
from collections.abc import Sequence

import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial

from lightning_bge.hpo.pruning.asha_trials import SETTLED_RUNGS, AshaTrials, rung_values
from lightning_bge.hpo.pruning.halving import Halving
from lightning_bge.hpo.ranking import sign_of
from lightning_bge.hpo.trials import parameter_set_of
from lightning_bge.runtime.compat.optuna import storage_of, trial_id_of


class AshaPruner(BasePruner):
    """Decides at each rung whether a trial pauses: always, unless it is the one that would be resumed next anyway.

    The trial then ends as PRUNED; `TrialQueue` resumes it.

    Args:
        steps: the rungs' steps, ascending.
        reduction_factor: of the trials that reach a rung, one in this many trains on.
    """

    def __init__(self, steps: Sequence[int], reduction_factor: int) -> None:
        self.steps = tuple(steps)
        self.reduction_factor = reduction_factor
        # of which study, how many trials, and what they have led to
        self._ended = "", 0, AshaTrials(steps, reduction_factor, 1.0)
        self._last = -1, Halving(0, reduction_factor)  # the trial that was asked about, and the state with it

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether to pause the trial at its last step."""
        last = trial.last_step
        reached = sum(step <= last for step in self.steps) if last is not None else 0
        if reached <= max(trial.system_attrs.get(SETTLED_RUNGS, 0), trial.user_attrs.get(SETTLED_RUNGS, 0)):
            return False
        # a trial is asked between rungs too, and is not judged again there; Optuna's halving marks its rungs like this
        storage_of(study).set_trial_system_attr(trial_id_of(trial), SETTLED_RUNGS, reached)
        halving, rung, value = self._before(study, trial)
        self._last = trial.number, halving
        return halving.arrive(parameter_set_of(trial), rung, value)

    def can_be_resumed(self, study: optuna.Study, trial: FrozenTrial, n_trials: int) -> bool:
        """Whether a trial that pauses now may ever be resumed, so that it needs a checkpoint.

        Args:
            study: the study.
            trial: the trial, which pauses at its last step.
            n_trials: how many parameter sets the study has in all.
        """
        number, halving = self._last
        if number != trial.number:
            halving, rung, value = self._before(study, trial)
            halving.add(parameter_set_of(trial), rung, value, paused=True)
        return halving.can_be_resumed(parameter_set_of(trial), n_trials)

    def halving(self, study: optuna.Study, trials: Sequence[FrozenTrial], without: int | None = None) -> Halving:
        """The state of successive halving that the study's trials have led to; `without`: a parameter set left out.

        What the first trials have led to is kept as soon as they have all ended: they never change.
        """
        name, count, ended = self._ended
        if name != study.study_name or count > len(trials):
            count, ended = 0, AshaTrials(self.steps, self.reduction_factor, sign_of(study))
        new = list(itertools.takewhile(lambda trial: trial.state.is_finished(), trials[count:]))
        ended.add(new)
        self._ended = study.study_name, count + len(new), ended
        now = ended.copy()
        now.add(trials[count + len(new) :])
        return now.halving if without is None else now.without(without)

    def _before(self, study: optuna.Study, trial: FrozenTrial) -> tuple[Halving, int, float]:
        """The state before a trial reaches its last rung, that rung, and its value there."""
        number = parameter_set_of(trial)
        halving = self.halving(study, study.get_trials(deepcopy=False), without=number)
        *earlier, (rung, value) = rung_values(trial, self.steps, sign_of(study)).items()
        for passed, at in earlier:
            halving.add(number, passed, at, paused=False)
        return halving, rung, value
