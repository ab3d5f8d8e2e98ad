"""The hours of a study: how long it ran, when it found its best values, what pruning saved, and the time left."""

from bisect import bisect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.analysis.history import History, PastTrial
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.forecast.eta import Eta, SearchOptions, estimate_end
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.ranking import maximizes
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.storage.workers import loss_of
from lightning_bge.hpo.trials import ENDED


class StudyClock:
    """The hours of a study in which at least one trial was running.

    Pauses between two starts of a study are left out, and an hour in which several trials ran counts once.

    Args:
        history: the study.
    """

    def __init__(self, history: History) -> None:
        self.spans: list[tuple[datetime, datetime]] = []
        for start, end in sorted(
            (trial.start, trial.end or history.read_at)
            for trial in history.trials
            if trial.start is not None and (trial.end is not None or trial.outcome == "running")
        ):
            if self.spans and start <= self.spans[-1][1]:
                self.spans[-1] = (self.spans[-1][0], max(end, self.spans[-1][1]))
            else:
                self.spans.append((start, end))
        # seconds before each span, and in all spans together
        self.before = [0.0, *accumulate((end - start).total_seconds() for start, end in self.spans)]

    def hours(self, moment: datetime | None = None) -> float:
        """Hours up to a moment; None: all hours."""
        if moment is None:
            return self.before[-1] / 3600
        last = bisect(self.spans, moment, key=lambda span: span[0]) - 1
        if last < 0:
            return 0.0
        start, end = self.spans[last]
        return (self.before[last] + (min(moment, end) - start).total_seconds()) / 3600


def best_over_hours(history: History) -> list[tuple[float, PastTrial]]:
    """The trials that were the best so far when they ended, each with the hours of the study at its end."""
    clock = StudyClock(history)
    found: list[tuple[float, PastTrial]] = []
    for end, trial in sorted(((trial.end, trial) for trial in history.ranked if trial.end), key=lambda one: one[0]):
        if not found or history.rank(trial) < history.rank(found[-1][1]):
            found.append((clock.hours(end), trial))
    return found


@dataclass(frozen=True)
class Savings:
    """The hours that pruning has saved.

    Attributes:
        spent: hours of all ended trials; hours of trials that ran at the same time are added up.
        saved: hours that the pruned trials, and the paused ones that were not resumed, would have taken further: the
            steps that are missing, times the trial's own mean seconds per step. An estimate, as nobody knows which of
            these folds would have stopped early.
        trials: number of these trials.
    """

    spent: float
    saved: float
    trials: int


def hours_saved(history: History) -> Savings:
    """Estimate the hours that pruning has saved so far."""
    spent = sum((trial.end - trial.start).total_seconds() for trial in history.trials if trial.end and trial.start)
    early = [trial for trial in history.trials if trial.outcome in ("paused", "pruned") and trial.last_step]
    saved = sum((history.steps.total - trial.last_step) * trial.curve_seconds / trial.last_step for trial in early)
    return Savings(spent / 3600, saved / 3600, len(early))


def time_left(
    study: optuna.Study, seed_replicates: Sequence[FrozenTrial], living: Collection[str], options: Mapping[str, Any]
) -> Eta | None:
    """Estimate how long a running study still takes, seed replicates and refit included.

    Args:
        study: of `lightning-bge hpo`.
        seed_replicates: the trials of its seed replicates.
        living: the ids of the workers that live.
        options: the section `hpo` of the run's config.yaml; empty where there is none.

    Returns:
        None where nothing is running, no trial has ended, or the options do not have the number of trials.
    """
    trials, replicates = (
        [one for one in found if one.state != TrialState.RUNNING or loss_of(one, living) is None]
        for found in (study.get_trials(deepcopy=False), seed_replicates)
    )
    running = [trial for trial in [*trials, *replicates] if trial.state == TrialState.RUNNING]
    n_trials = options.get("n_trials")
    if not running or n_trials is None:
        return None
    search = SearchOptions(
        PrunerConfig(**(options.get("pruner") or {})),
        n_trials,
        Steps(**study.user_attrs["steps"]),
        "maximize" if maximizes(study) else "minimize",
        sampler=(options.get("sampler") or {}).get("name", "tpe"),
        n_seeds=StudyConfig(n_trials=n_trials, seed_replicates=options.get("seed_replicates")).n_seed_replicates,
        refit=bool(options.get("refit", True)),
        baseline=bool(options.get("baseline", True)),
    )
    n_replicated = sum(trial.state in ENDED for trial in replicates)
    return estimate_end(trials, search, len(running), datetime.now(), n_replicated)
