"""Resumes paused trials of a study, and keeps the checkpoints of those that may still be resumed."""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import optuna
from filelock import FileLock
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.pruning.asha import AshaPruner
from lightning_bge.hpo.pruning.asha_trials import (
    RESUMES,
    any_complete,
    any_queued,
    ended_parameter_sets,
    latest_trials,
    resume,
)


class AshaScheduler:
    """Resumes the next paused trial, and stops the study when none is left; an Optuna callback.

    Args:
        pruner: the study's pruner.
        n_trials: how many parameter sets the study has in all.
        folder: holds the paused trials' checkpoints, one folder each.
        limit: bytes that these may take on the disk; beyond, the lowest of the ranking are deleted, and such a trial is
            trained from its start if it is resumed. Default: a quarter of what is free.
    """

    def __init__(self, pruner: AshaPruner, n_trials: int, folder: Path, limit: float | None = None) -> None:
        self.pruner, self.n_trials, self.folder, self.limit = pruner, n_trials, folder, limit

    def __call__(self, study: optuna.Study, trial: FrozenTrial | None = None) -> None:
        """Optuna calls this after each trial; call it once before the first, too."""
        with self._locked():
            trials = study.get_trials(deepcopy=False)
            found = self.pruner.next_resumed(study, trials, self.n_trials)
            if found is not None:
                resume(study, latest_trials(trials)[found], self.pruner.steps)
            self._clear(study)
        all_ended = ended_parameter_sets(trials) >= self.n_trials
        if found is None and all_ended and not any_queued(trials) and trial is not None:
            study.stop()

    def resume_best(self, study: optuna.Study) -> bool:
        """Where no trial is complete or running, queue the best paused one; return whether one is queued."""
        with self._locked():
            trials = study.get_trials(deepcopy=False)
            if any_complete(trials) or any(trial.state == TrialState.RUNNING for trial in trials):
                return False
            if any_queued(trials):
                return True
            found = self.pruner.halving(study, trials).best_paused()
            if found is not None:
                resume(study, latest_trials(trials)[found], self.pruner.steps)
        return found is not None

    def _locked(self) -> FileLock:
        """Two workers must not resume the same parameter set."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return FileLock(self.folder / "lock", mode=0o600)

    def _clear(self, study: optuna.Study) -> None:
        """Delete the checkpoints of trials that can no longer be resumed, and those beyond the limit."""
        trials = study.get_trials(deepcopy=False)
        needed = {
            trial.user_attrs[RESUMES]
            for trial in trials
            if RESUMES in trial.user_attrs and not trial.state.is_finished()
        }
        room = self.limit
        if room is None:
            room = (shutil.disk_usage(self.folder).free + _size(self.folder)) / 4
        kept = set()
        for number in [*needed, *self._resumable(study, trials)]:
            room -= _size(self.folder / str(number))
            if room >= 0 or number in needed:
                kept.add(number)
        for trial in trials:
            folder = self.folder / str(trial.number)
            if trial.state.is_finished() and trial.number not in kept and folder.is_dir():
                (folder / "state.pt").unlink(missing_ok=True)  # first: without it the rest is not read
                shutil.rmtree(folder, ignore_errors=True)

    def _resumable(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[int]:
        """The numbers of paused trials that may still be resumed, those first whose checkpoints are kept first."""
        latest = latest_trials(trials)
        return [latest[number].number for number in self.pruner.halving(study, trials).resumable(self.n_trials)]


def _size(folder: Path) -> int:
    """Bytes of the files below a folder; other processes may write and delete there meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_size
    return total
