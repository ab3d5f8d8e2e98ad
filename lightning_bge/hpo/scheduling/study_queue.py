"""The trials of a study that are left: to be continued, resumed, enqueued or drawn."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.asha import AshaPruner
from lightning_bge.hpo.pruning.asha_trials import SETTLED_RUNGS, is_paused
from lightning_bge.hpo.pruning.halving import Halving
from lightning_bge.hpo.scheduling.trial_queue import TrialQueue, Tries
from lightning_bge.hpo.space.draw import draw_parameter_set, space_size
from lightning_bge.hpo.space.search_space import Space
from lightning_bge.hpo.storage.study_storage import StudyStorage
from lightning_bge.hpo.storage.workers import Worker
from lightning_bge.hpo.terminator import StudyEnd
from lightning_bge.hpo.trials import (
    ENQUEUED,
    N_TRIALS,
    NOT_TRAINED,
    PAUSED_AT,
    RESUMES,
    any_complete,
    key_of,
    one_trial_each,
)
from lightning_bge.runtime.compat.optuna import storage_of, trial_id_of
from lightning_bge.runtime.stop import StopRequest

log = logging.getLogger("lightning_bge")


class StudyQueue(TrialQueue):
    """What is left of a study: trials to be continued, resumed, enqueued or drawn.

    Args:
        study: the study.
        place: where it is kept.
        worker: this process.
        config: the options of the study.
        space: the search space.
        enqueued: parameter sets that are tried first.
    """

    def __init__(
        self,
        study: optuna.Study,
        place: StudyStorage,
        worker: Worker,
        config: StudyConfig,
        space: Space,
        enqueued: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(study, place, worker, config)
        self.end = StudyEnd(study) if config.terminator else None
        self._keys: dict[int, Any] = {}  # of each parameter set
        self._known: tuple[Tries, Halving] | None = None  # computed once for each look at the trials
        self.space, self.enqueued, self.size = space, [dict(values) for values in enqueued], space_size(space)

    @property
    def n_trials(self) -> int:
        """How many parameter sets the study has in all."""
        return int(min(self.study.user_attrs.get(N_TRIALS, self.config.n_trials), self.size))

    def next(self, until: float, request: StopRequest) -> optuna.Trial | None:
        """As `TrialQueue.next`; looks first whether `hpo.terminator` ends the study."""
        if self.end is not None:
            self.end.update()
        return super().next(until, request)

    def is_finished(self) -> bool:
        """Whether nothing is left; what other processes run may leave more."""
        tries = self.tries()
        return self._to_resume(tries) is None and not tries.lost and not self._is_new(tries)

    def begin(self, tries: Tries) -> optuna.Trial | None:
        """Continue a lost trial, else resume a paused one, else begin a new one."""
        if tries.lost:
            return self.retry(tries.lost[0])
        if (paused := self._to_resume(tries)) is not None:
            return self._resume(paused)
        while self._is_new(tries):
            trial, decided = self._new(tries)
            if decided:
                return trial
            tries = self.tries()
        return None

    def last_resort(self, tries: Tries) -> optuna.Trial | None:
        """Where no trial is complete and none runs: one of those that have got furthest."""
        if any_complete(tries.trials) or tries.running:
            return None
        if tries.lost:
            return self.retry(tries.lost[0])
        halving = self._halving(tries)
        found = None if halving is None else halving.best_paused()
        if found is None:
            return None
        print("hpo.timeout is over and no trial is complete: the best paused one is resumed", flush=True)
        return self._resume(tries.by_set[found][-1])

    def resumable(self, tries: Tries) -> list[int]:
        """The paused parameter sets that may be resumed, the best first."""
        halving = self._halving(tries)
        return [] if halving is None else halving.resumable(self.n_trials)

    def _halving(self, tries: Tries) -> Halving | None:
        """The state of successive halving; None with another pruner."""
        pruner = self.study.pruner
        if not isinstance(pruner, AshaPruner):
            return None
        if self._known is None or self._known[0] is not tries:
            self._known = tries, pruner.halving(self.study, tries.trials)
        return self._known[1]

    def _to_resume(self, tries: Tries) -> FrozenTrial | None:
        halving = self._halving(tries)
        if halving is None or self._is_terminated:
            return None
        nothing_else = not (tries.running or tries.lost or self._is_new(tries))
        found = halving.next_resumed(nothing_else)
        return None if found is None else tries.by_set[found][-1]

    def _resume(self, paused: FrozenTrial) -> optuna.Trial:
        assert is_paused(paused)
        settled = sum(rung <= paused.user_attrs[PAUSED_AT] for rung in self.rungs)
        return self.go_on(paused, {RESUMES: paused.number, SETTLED_RUNGS: settled})

    @property
    def _is_terminated(self) -> bool:
        return self.end is not None and self.end.reached

    def _is_new(self, tries: Tries) -> bool:
        """Whether another parameter set is to be tried."""
        begun = len(tries.by_set)
        if self._is_terminated:
            return False
        return begun - len(tries.failed) < self.n_trials and begun < self.size

    def _new(self, tries: Tries) -> tuple[optuna.Trial | None, bool]:
        """Begin a parameter set that the study has not; the second value is false where it is to be called again."""
        for number, made in tries.by_set.items():
            if number not in self._keys:
                self._keys[number] = key_of(made[0].params)
        taken = {self._keys[number] for number in tries.by_set}
        waiting = next((trial for trial in tries.trials if trial.state == TrialState.WAITING), None)
        if waiting is not None:
            given = {**waiting.system_attrs.get("fixed_params", {}), **waiting.params}
        else:
            given = next(self._not_tried(tries, taken), {})
        found = draw_parameter_set(
            self.study,
            self.space,
            self.config.sampler,
            seen=one_trial_each(tries.trials),
            ordinal=len(tries.by_set),
            taken=taken,
            given=given,
        )
        if waiting is not None:
            return self._take_waiting(waiting, found)
        if found is None and given:
            self.enqueued.remove(given)  # the study has every parameter set with these values
            return None, False
        if found is None:
            text = "hpo.sampler found no parameter set that the study has not after %d trials: the study ends with them"
            log.warning(text, len(tries.by_set))
            self.size = len(tries.by_set)
            return None, True
        return self.start(found, {ENQUEUED: given} if given else {}), True

    def _not_tried(self, tries: Tries, taken: Collection[Any]) -> Iterator[dict[str, Any]]:
        """The parameter sets of `hpo.enqueue` that the study has not."""
        if self.enqueued:
            known = [trial.user_attrs.get(ENQUEUED) for trial in tries.trials if NOT_TRAINED not in trial.user_attrs]
            yield from (values for values in self.enqueued if values not in known and key_of(values) not in taken)

    def _take_waiting(self, waiting: FrozenTrial, found: FrozenTrial | None) -> tuple[optuna.Trial | None, bool]:
        """Begin a trial that another program has queued, such as with `Study.enqueue_trial`."""
        storage, trial_id = storage_of(self.study), trial_id_of(waiting)
        if found is None:
            log.warning("trial %d is not trained: the study has its parameter set already", waiting.number)
            storage.set_trial_user_attr(trial_id, NOT_TRAINED, "its parameter set was there already")
            storage.set_trial_state_values(trial_id, TrialState.FAIL)
            return None, False
        for name, value in found.params.items():
            distribution = found.distributions[name]
            storage.set_trial_param(trial_id, name, distribution.to_internal_repr(value), distribution)
        for name, value in self.worker.attributes.items():
            storage.set_trial_user_attr(trial_id, name, value)
        storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        return optuna.Trial(self.study, trial_id), True
