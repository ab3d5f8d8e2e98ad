"""Successive halving that pauses trials instead of ending them: a paused one is resumed when it has earned it.

Asynchronous successive halving as published (Li et al., arXiv:1810.05934): a trial pauses at each rung, and whenever a
worker is free the best paused trial that is in the top 1/eta of its rung is resumed; only where there is none a new
trial is begun. Optuna's halving has to judge a trial for good on its arrival, among the few that came before it; here
a trial that looked poor among the first ten can still be resumed when it looks good among a hundred.

Optuna can't reopen a trial. A resumed trial is a new one with the same parameters and the user attribute `continues`,
the number of the paused one; what it stands for is one point, counted once.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.ranking import sign_of

Standings = Mapping[int, Mapping[int, float]]  # point -> rung -> value there, higher is better


RESUMES = "resumes"  # user attribute of a resumed trial: the paused trial's number
PARAMETER_SET = "parameter_set"  # user attribute of a resumed trial: the number of its parameter set's first trial
ATTEMPTS = 3  # to go on with a point whose process dies or fails each time
PAUSED_AT = "paused_at"  # user attribute of a paused trial: the step


def rung_steps(n_reports: int, first: int, eta: int) -> tuple[int, ...]:
    """The reports at which trials pause: first, first * eta, first * eta**2 ..., all before the last one."""
    steps = []
    step = first
    while step < n_reports:
        steps.append(step)
        step *= eta
    return tuple(steps)


def next_resumed(
    standings: Standings, rungs: int, eta: int, busy: frozenset[int] | set[int] = frozenset()
) -> int | None:
    """The paused point to be resumed next; None: begin a new one.

    Args:
        standings: what each point had at each rung that it has reached, from 0.
        rungs: number of rungs.
        eta: one in so many of a rung's points goes on.
        busy: points that are running.
    """
    for rung in reversed(range(rungs)):
        ranked = ranking(standings, rung)
        for point in ranked[: len(ranked) // eta]:
            if max(standings[point]) == rung and point not in busy:
                return point
    return None


def ranking(standings: Standings, rung: int) -> list[int]:
    """The points that have reached a rung, best first; of equal ones the earlier."""
    there = [point for point, values in standings.items() if rung in values]
    return sorted(there, key=lambda point: (-standings[point][rung], point))


def hopeless(standings: Standings, rungs: int, eta: int, points: int) -> set[int]:
    """Paused points that no later result can bring back, as too many already stand above them.

    A rung never holds more than all points, so that no more than points // eta of it can be in its top share at once.

    Args:
        standings: as above.
        rungs: as above.
        eta: as above.
        points: how many points there will be in all.
    """
    found = set()
    for rung in range(rungs):
        found |= {point for point in ranking(standings, rung)[points // eta :] if max(standings[point]) == rung}
    return found


# ---------------------------------------------------------------------- in a study


class AshaPruner(BasePruner):
    """Says at each rung whether a trial pauses: always, unless it is the one that would be resumed next anyway.

    Args:
        steps: the rungs' reports, ascending.
        reduction_factor: one in so many of a rung's trials goes on.
    """

    def __init__(self, steps: Sequence[int], reduction_factor: int) -> None:
        self.steps = tuple(steps)
        self.reduction_factor = reduction_factor

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether to pause the trial at its last report."""
        last = trial.last_step
        reached = sum(step <= last for step in self.steps) if last is not None else 0
        if reached <= max(trial.system_attrs.get("settled_rungs", 0), trial.user_attrs.get("settled_rungs", 0)):
            return False
        # as Optuna's halving does with its rungs: a trial is asked between rungs too, and is not judged again there
        study._storage.set_trial_system_attr(trial._trial_id, "settled_rungs", reached)
        trials = study.get_trials(deepcopy=False)
        mine = parameter_set_of(trial)
        there = standings(study, self.steps, trials)
        there[mine] = _values(trial, self.steps, sign_of(study))
        return next_resumed(there, len(self.steps), self.reduction_factor, not_resumable(trials) - {mine}) != mine

    def can_be_resumed(self, study: optuna.Study, trial: FrozenTrial, points: int) -> bool:
        """Whether a trial that pauses now may ever go on, of so many points in all: else no checkpoint is written."""
        trials, mine = study.get_trials(deepcopy=False), parameter_set_of(trial)
        there = standings(study, self.steps, trials)
        there[mine] = _values(trial, self.steps, sign_of(study))
        if mine not in hopeless(there, len(self.steps), self.reduction_factor, points):
            return True
        return last_resumed(there, not_resumable(trials) - {mine}, any_complete(trials)) == mine


def parameter_set_of(trial: FrozenTrial) -> int:
    """The number of the first trial of the point that a trial stands for."""
    return int(trial.user_attrs.get(PARAMETER_SET, trial.number))


def standings(study: optuna.Study, steps: Sequence[int], trials: Sequence[FrozenTrial]) -> dict[int, dict[int, float]]:
    """What each point has at each rung that it has reached, higher is better; failed trials are left out."""
    found: dict[int, dict[int, float]] = {}
    for trial in trials:
        if trial.state != TrialState.FAIL and (values := _values(trial, steps, sign_of(study))):
            found.setdefault(parameter_set_of(trial), {}).update(values)
    return found


def _values(trial: FrozenTrial, steps: Sequence[int], sign: float) -> dict[int, float]:
    reported = trial.intermediate_values
    return {rung: sign * reported[step] for rung, step in enumerate(steps) if step in reported}


def not_resumable(trials: Sequence[FrozenTrial]) -> set[int]:
    """Points that can't be resumed: running, waiting, finished, ended for want of memory or by a NaN, or given up."""
    busy = {
        point
        for point, one in latest_trials(trials).items()
        if one.state != TrialState.PRUNED or PAUSED_AT not in one.user_attrs
    }
    failed = Counter(
        parameter_set_of(trial)
        for trial in trials
        if trial.state == TrialState.FAIL
        and RESUMES in trial.user_attrs
        and not str(trial.user_attrs.get("swept", "")).startswith("interrupted")
    )
    return busy | {point for point, times in failed.items() if times >= ATTEMPTS}


def latest_trials(trials: Sequence[FrozenTrial]) -> dict[int, FrozenTrial]:
    """Each point's last trial that did not fail."""
    return {parameter_set_of(trial): trial for trial in trials if trial.state != TrialState.FAIL}


def any_complete(trials: Sequence[FrozenTrial]) -> bool:
    """Whether any trial ran to its end."""
    return any(trial.state == TrialState.COMPLETE for trial in trials)


class AshaScheduler:
    """Resumes what has earned it, and ends the study when nothing has and all points have begun; an Optuna callback.

    Args:
        pruner: the study's pruner.
        points: how many points the study has in all.
        folder: holds the paused trials' checkpoints, one folder each.
        limit: bytes that these may take on the disk; beyond, those that stand lowest are deleted, and such a trial is
            trained from its start if it is resumed all the same. Default: a quarter of what is free.
    """

    def __init__(self, pruner: AshaPruner, points: int, folder: Path, limit: float | None = None) -> None:
        self.pruner, self.points, self.folder, self.limit = pruner, points, folder, limit

    def __call__(self, study: optuna.Study, trial: FrozenTrial | None = None) -> None:
        """Optuna calls this after each trial; call it once before the first, too."""
        # two workers must not resume the same point
        with _locked(self.folder / "lock"):
            trials = study.get_trials(deepcopy=False)
            point = _next(study, self.pruner, self.points, trials)
            if point is not None:
                resume(study, latest_trials(trials)[point], self.pruner.steps)
            self._clear(study)
        if point is None and ended_parameter_sets(trials) >= self.points and not _queued(trials) and trial is not None:
            study.stop()

    def resume_best(self, study: optuna.Study) -> bool:
        """Where no trial is complete or running, queue the best paused one; return whether one waits to go on."""
        with _locked(self.folder / "lock"):
            trials = study.get_trials(deepcopy=False)
            if any(trial.state in (TrialState.COMPLETE, TrialState.RUNNING) for trial in trials):
                return False
            point = last_resumed(standings(study, self.pruner.steps, trials), not_resumable(trials), complete=False)
            if point is not None and not _queued(trials):
                resume(study, latest_trials(trials)[point], self.pruner.steps)
        return point is not None or _queued(trials)

    def _clear(self, study: optuna.Study) -> None:
        """Delete the checkpoints of trials that can no longer be resumed, and those beyond the limit."""
        trials = study.get_trials(deepcopy=False)
        needed = {
            one.user_attrs[RESUMES] for one in trials if RESUMES in one.user_attrs and not one.state.is_finished()
        }
        room = self.limit
        if room is None:
            room = (shutil.disk_usage(self.folder).free + _taken(self.folder)) / 4
        kept = set()
        for number in [*needed, *self._resumable(study, trials)]:
            room -= _taken(self.folder / str(number))
            if room >= 0 or number in needed:
                kept.add(number)
        for trial in trials:
            folder = self.folder / str(trial.number)
            if trial.state.is_finished() and trial.number not in kept and folder.is_dir():
                (folder / "state.pt").unlink(missing_ok=True)  # first: without it the rest counts for nothing
                shutil.rmtree(folder, ignore_errors=True)

    def _resumable(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[int]:
        """The paused trials that may still be resumed: the higher rung first, and the better on it."""
        there, busy = standings(study, self.pruner.steps, trials), not_resumable(trials)
        gone = hopeless(there, len(self.pruner.steps), self.pruner.reduction_factor, self.points)
        # where none is complete the best one stays, as the study's last resort
        gone -= {last_resumed(there, busy, any_complete(trials))}
        latest = latest_trials(trials)
        ranked = sorted(there, key=lambda point: (-max(there[point]), -there[point][max(there[point])], point))
        return [latest[point].number for point in ranked if point not in busy | gone]


def nothing_left(study: optuna.Study, pruner: AshaPruner, points: int) -> bool:
    """Whether all points have begun, and none is to be resumed or waits for it."""
    trials = study.get_trials(deepcopy=False)
    return (
        ended_parameter_sets(trials) >= points and not _queued(trials) and _next(study, pruner, points, trials) is None
    )


def _queued(trials: Sequence[FrozenTrial]) -> bool:
    """Whether a trial waits that goes on with a paused one."""
    return any(trial.state == TrialState.WAITING and RESUMES in trial.user_attrs for trial in trials)


def _next(study: optuna.Study, pruner: AshaPruner, points: int, trials: Sequence[FrozenTrial]) -> int | None:
    there, busy = standings(study, pruner.steps, trials), not_resumable(trials)
    point = next_resumed(there, len(pruner.steps), pruner.reduction_factor, busy)
    running = any(trial.state == TrialState.RUNNING for trial in trials)
    if point is not None or ended_parameter_sets(trials) < points or running or _queued(trials):
        return point
    return last_resumed(there, busy, any_complete(trials))


def _taken(folder: Path) -> int:
    """Bytes of the files below a folder; other processes may write and delete there meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def last_resumed(there: Standings, busy: set[int], complete: bool) -> int | None:
    """The point that is resumed when nothing else is left to do and none is complete: the best of the highest rung."""
    paused = [point for point in there if point not in busy]
    if complete or not paused:
        return None
    return max(paused, key=lambda point: (max(there[point]), there[point][max(there[point])], -point))


def resumed_numbers(trials: Sequence[FrozenTrial]) -> set[int]:
    """The numbers of paused trials that were resumed, or are about to be."""
    return {trial.user_attrs[RESUMES] for trial in trials if RESUMES in trial.user_attrs}


def ended_parameter_sets(trials: Sequence[FrozenTrial]) -> int:
    """Points whose first trial has ended: complete, pruned or paused."""
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    return sum(trial.state in ended and RESUMES not in trial.user_attrs for trial in trials)


def resume(study: optuna.Study, paused: FrozenTrial, steps: Sequence[int]) -> None:
    """Queue a trial that goes on where a paused one stopped."""
    at = paused.user_attrs[PAUSED_AT]
    attributes = {
        RESUMES: paused.number,
        PARAMETER_SET: parameter_set_of(paused),
        "settled_rungs": sum(step <= at for step in steps),
    }
    study.enqueue_trial(paused.params, user_attrs=attributes)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
