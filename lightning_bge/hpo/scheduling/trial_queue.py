"""Which trial a process runs next: decided under a lock, from the trials of the study alone.

No queue is stored. What is to be continued, resumed, tried or drawn follows from the trials that are there, and a trial
begins with one write that holds its parameters, its worker and the reports that it takes over. So a process may be
killed anywhere, and the next one decides the same.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_bge.errors import StudyError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.asha import AshaPruner
from lightning_bge.hpo.pruning.asha_trials import SETTLED_RUNGS
from lightning_bge.hpo.pruning.oom import KEPT, OOM_ATTRIBUTES
from lightning_bge.hpo.storage.files import study_files
from lightning_bge.hpo.storage.study_storage import StudyStorage
from lightning_bge.hpo.storage.workers import Worker, end_lost_trials, losses
from lightning_bge.hpo.trial.checkpoint import STATE, SavedTrial
from lightning_bge.hpo.trials import (
    COMPUTED_WITH,
    ENDED,
    ERROR,
    INTERRUPTED,
    NOT_TRAINED,
    PARAMETER_SET,
    PAUSED_AT,
    REPORTS_BEFORE,
    RETRY_OF,
    WORKER,
    WORKER_LOST,
    attempts,
    has_failed,
    is_to_be_continued,
    parameter_set_of,
)
from lightning_bge.runtime.compat.optuna import running_trial
from lightning_bge.runtime.locations import delete_folder, file_sizes
from lightning_bge.runtime.stop import StopRequest

log = logging.getLogger("lightning_bge")

CHECKPOINTS = "checkpoints"  # folder in the run folder
POLL_SECONDS = 0.5  # between two looks of a process that waits for others
# user attributes that say what became of a trial, which the one that continues it does not take over
FATE = (
    WORKER,
    COMPUTED_WITH,
    WORKER_LOST,
    INTERRUPTED,
    ERROR,
    PAUSED_AT,
    REPORTS_BEFORE,
    RETRY_OF,
    "pruned_at",
    "fold",
    "epoch",
    "curve",
    "nan",
    KEPT,
    *OOM_ATTRIBUTES,
)
# system attributes of a trial that the one that continues it does not take over, nor a trial what its draft has
OF_DRAFTS = ("fixed_params", "tpe:", SETTLED_RUNGS)


@dataclass(frozen=True)
class Tries:
    """All trials of a study, by parameter set.

    Attributes:
        trials: all of them.
        by_set: the attempts at each parameter set, by its number.
    """

    trials: Sequence[FrozenTrial]
    by_set: Mapping[int, list[FrozenTrial]]

    @cached_property
    def _unsettled(self) -> list[list[FrozenTrial]]:
        """The attempts at the parameter sets whose last one has not ended by itself."""
        return [tries for tries in self.by_set.values() if tries[-1].state not in ENDED]

    @cached_property
    def running(self) -> bool:
        """Whether any trial runs."""
        return any(tries[-1].state == TrialState.RUNNING for tries in self._unsettled)

    @cached_property
    def lost(self) -> list[FrozenTrial]:
        """The last attempts that are to be continued, as their process is gone or was interrupted; the oldest first."""
        return [tries[-1] for tries in self._unsettled if is_to_be_continued(tries)]

    @cached_property
    def failed(self) -> list[FrozenTrial]:
        """The last attempts at the parameter sets that are not tried once more."""
        return [tries[-1] for tries in self._unsettled if has_failed(tries)]


class TrialQueue(ABC):
    """What a process runs of a study, one trial after another; others may do so at once.

    Args:
        study: the study.
        place: where it is kept.
        worker: this process.
        config: the options of the study.
        folder: of its trials' checkpoints, within that of all checkpoints; empty: that one.

    Attributes:
        files: where the study keeps what its processes share.
        checkpoints: what is needed to continue a trial, a folder for each parameter set.
    """

    def __init__(
        self, study: optuna.Study, place: StudyStorage, worker: Worker, config: StudyConfig, folder: str = ""
    ) -> None:
        self.study, self.place, self.worker, self.config = study, place, worker, config
        self.run_dir, self.files = place.run_dir, study_files(config.files, place.run_dir)
        self.checkpoints = self.files / CHECKPOINTS / folder if folder else self.files / CHECKPOINTS

    def next(self, until: float, request: StopRequest) -> optuna.Trial | None:
        """Begin the next trial; wait while there is none to begin, but other processes may leave one.

        Args:
            until: `time.monotonic()` after which no trial begins, unless none has run to its end.
            request: ends the waiting.

        Returns:
            None: nothing is left, or it is left to other processes, or a stop was requested.

        Raises:
            StudyError: too many trials have failed.
        """
        while not request.signal:
            self.worker.renew()
            with self.place.lock(self.worker, self._read_ahead) as is_held:
                workers, deaths = self.place.workers, self.config.max_worker_deaths
                trials = end_lost_trials(self.study, workers, deaths, idle=self.worker.id)
                tries = Tries(trials, attempts(trials))
                self.check_failures(tries)
                over = time.monotonic() >= until
                self.clear(tries)
                trial = self.last_resort(tries) if over else self.begin(tries)
                if trial is not None and is_held():
                    return trial
            if trial is not None:
                self._leave_out(trial)
                continue
            if not tries.running or (over and len(self.place.workers.living()) > 1):
                return None
            self._wait(tries, until, request)
        return None

    def _read_ahead(self) -> None:
        """Read what is read again under the lock: a database is then asked only for what has changed since."""
        running = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state == TrialState.RUNNING]
        losses(running, self.place.workers)

    def _leave_out(self, trial: optuna.Trial) -> None:
        """End a trial that was begun when others had taken over the lock already, and may have begun it too."""
        with suppress(UpdateFinishedTrialError):  # they have ended it
            trial.set_user_attr(NOT_TRAINED, "its process had lost the lock")
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)

    def _wait(self, tries: Tries, until: float, request: StopRequest) -> None:
        """Wait, without the lock, until other processes have begun or ended a trial, or one of them is gone."""
        known = [trial.state for trial in tries.trials]
        in_time = time.monotonic() < until
        while not request.signal and (time.monotonic() < until) == in_time:
            time.sleep(POLL_SECONDS)
            trials = self.study.get_trials(deepcopy=False)
            running = [trial for trial in trials if trial.state == TrialState.RUNNING]
            if [trial.state for trial in trials] != known or losses(running, self.place.workers):
                return

    def tries(self) -> Tries:
        """All trials, as they are now."""
        trials = self.study.get_trials(deepcopy=False)
        return Tries(trials, attempts(trials))

    @abstractmethod
    def begin(self, tries: Tries) -> optuna.Trial | None:
        """Begin the next trial; None: there is none now."""

    def last_resort(self, tries: Tries) -> optuna.Trial | None:
        """Begin a trial although the time is over; None: none has to."""
        return None

    def resumable(self, tries: Tries) -> list[int]:
        """The parameter sets that may be resumed later, those first whose checkpoints are kept first."""
        return []

    def check_failures(self, tries: Tries) -> None:
        """Raise StudyError where too many parameter sets have failed."""
        failed = tries.failed
        if len(failed) > self.config.max_failures:
            last = failed[-1]
            raise StudyError(
                f"{len(failed)} trials have failed, and hpo.max_failures is {self.config.max_failures}. The last one, "
                f"trial {last.number}: {last.user_attrs.get(ERROR, 'unknown')}. `lightning-bge status {self.run_dir} "
                "--failures` shows why each failed. Correct the cause, or raise hpo.max_failures, and start again"
            )

    def start(
        self, trial: FrozenTrial, attributes: Mapping[str, Any], reports: Mapping[int, float] | None = None
    ) -> optuna.Trial:
        """Begin a trial with the parameters and the system attributes of another one.

        Args:
            trial: the other one; it may be a draft.
            attributes: its user attributes, besides the worker.
            reports: what it takes over, value by step.
        """
        template = create_trial(
            state=TrialState.RUNNING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={**attributes, **self.worker.attributes},
            system_attrs={name: value for name, value in trial.system_attrs.items() if not name.startswith(OF_DRAFTS)},
            intermediate_values=dict(reports or {}),
        )
        return running_trial(self.study, template)

    def retry(self, lost: FrozenTrial) -> optuna.Trial:
        """Begin a trial that continues one whose process is gone or was interrupted."""
        return self.go_on(lost, {RETRY_OF: lost.number})

    def go_on(self, earlier: FrozenTrial, attributes: Mapping[str, Any]) -> optuna.Trial:
        """Begin a trial that continues an earlier one, from what was saved of it.

        Args:
            earlier: the last attempt at the parameter set.
            attributes: user attributes, besides those that it takes over.
        """
        number = parameter_set_of(earlier)
        saved = SavedTrial.load(self.checkpoints / str(number))
        step = 0 if saved is None else saved.step
        reports = {at: value for at, value in earlier.intermediate_values.items() if at <= step}
        kept = {name: value for name, value in earlier.user_attrs.items() if name not in FATE}
        settled = sum(rung <= step for rung in self.rungs)
        attributes = (
            {SETTLED_RUNGS: max(settled, kept.get(SETTLED_RUNGS, 0)), **attributes} if self.rungs else attributes
        )
        return self.start(earlier, {**kept, **attributes, PARAMETER_SET: number, REPORTS_BEFORE: len(reports)}, reports)

    @property
    def rungs(self) -> Sequence[int]:
        """The steps at which trials pause."""
        pruner = self.study.pruner
        return pruner.steps if isinstance(pruner, AshaPruner) else ()

    def clear(self, tries: Tries) -> None:
        """Delete the checkpoints of trials that can't be continued any more, and those beyond the limit."""
        sizes: Counter[str] = Counter()
        for name, size in file_sizes(self.checkpoints).items():
            sizes[name.partition("/")[0]] += size
        if not sizes:
            return
        needed = {parameter_set_of(trial) for trial in tries.lost}
        needed |= {number for number, made in tries.by_set.items() if made[-1].state == TrialState.RUNNING}
        room, kept = self._room(sizes.total()), set()
        for number in [*needed, *self.resumable(tries)]:
            room -= sizes[str(number)]
            if room >= 0 or number in needed:
                kept.add(number)
        for name in [*sizes]:
            if name.isdecimal() and int(name) not in kept:
                delete_folder(self.checkpoints / name, first=STATE)

    def _room(self, taken: int) -> float:
        """Bytes for checkpoints, of which some are taken; a bucket has no end."""
        limit = self.config.pruner.paused_gb
        if limit is not None:
            return limit * 2**30
        at = self.checkpoints
        return (shutil.disk_usage(at).free + taken) / 4 if isinstance(at, Path) else math.inf
