"""A line after each trial: what a study has done, and how long it still takes."""

from __future__ import annotations

import math
import time
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.forecast.eta import Eta, SearchOptions, estimate_end
from lightning_bge.hpo.pruning.asha import AshaPruner
from lightning_bge.hpo.ranking import cost_of, front, maximizes, ranked, score_of
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.trials import (
    ERROR,
    INTERRUPTED,
    PAUSED_AT,
    RESUMES,
    RETRY_OF,
    ended_parameter_sets,
    resumed_numbers,
)

if TYPE_CHECKING:
    from lightning_bge.hpo.config import StudyConfig

ETA_INTERVAL = 50  # times what estimating the time left takes, between two estimates: it takes 2 % of the time


def count(study: optuna.Study, *states: TrialState) -> int:
    """Number of trials in any of the states."""
    return len(study.get_trials(deepcopy=False, states=states))


def finished(study: optuna.Study) -> int:
    """Number of trials that have ended, completed or pruned; one that was paused and resumed counts once."""
    return ended_parameter_sets(study.get_trials(deepcopy=False))


def ended_early(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that were pruned, or paused and not resumed."""
    trials = study.get_trials(deepcopy=False)
    resumed = resumed_numbers(trials)
    return [trial for trial in trials if trial.state == TrialState.PRUNED and trial.number not in resumed]


class Progress:
    """Prints a line after each trial: how it ended, trials done and pruned, the best so far, the time left.

    Args:
        config: the options of the study.
        metric: its name.
        n_reports: reports of a trial that runs to its end.
    """

    def __init__(self, config: StudyConfig, metric: str, n_reports: int) -> None:
        self.config, self.n_trials, self.metric, self.n_reports = config, config.n_trials, metric, n_reports
        self.start = time.monotonic()
        self.eta: Eta | None = None
        self.estimated, self.took = -math.inf, 0.0  # when, and in how many seconds

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Optuna calls this after each trial."""
        done, pruned = self._done(study), len(ended_early(study))
        how = "paused" if isinstance(study.pruner, AshaPruner) else "pruned"
        print(
            f"[{done:>{len(str(self.n_trials))}}/{self.n_trials}] {self._name(trial)} {self._end(trial)} | "
            f"{pruned} {how} | {self._best(study, trial)} | elapsed {_clock(time.monotonic() - self.start)}"
            + self._left(study),
            flush=True,
        )

    def _left(self, study: optuna.Study) -> str:
        """The time left, with the range that holds in eight studies of ten; empty where it is not known yet."""
        now = time.monotonic()
        if now - self.estimated >= ETA_INTERVAL * self.took:
            self.estimated = now
            self.eta = self._estimate(study)
            self.took = time.monotonic() - now
        if self.eta is None:
            return ""
        low, mid, high = (_clock(max(0.0, seconds + self.estimated - now)) for seconds in vars(self.eta).values())
        return f", about {mid} left" + (f" ({low} to {high})" if low != high else "")

    def _estimate(self, study: optuna.Study) -> Eta | None:
        # a study of another program has no steps in its attributes
        steps = Steps(**study.user_attrs.get("steps", {"folds": 1, "epochs": self.n_reports}))
        trials = study.get_trials(deepcopy=False)
        direction: Any = "maximize" if maximizes(study) else "minimize"
        search = SearchOptions(
            self.config.pruner,
            self.n_trials,
            steps,
            direction,
            self.config.sampler.name,
            n_seeds=self.config.n_seed_replicates,
            refit=self.config.refit,
            baseline=self.config.baseline,
        )
        # the trial that has just ended is no longer among those that run, and its worker begins another one
        return estimate_end(trials, search, 1 + count(study, TrialState.RUNNING), datetime.now())

    def _done(self, study: optuna.Study) -> int:
        return finished(study)

    def _name(self, trial: FrozenTrial) -> str:
        known = trial.user_attrs
        earlier = f" (continues trial {known[RETRY_OF]})" if RETRY_OF in known else ""
        return f"trial {trial.number}" + (earlier or (f" (resumes trial {known[RESUMES]})" if RESUMES in known else ""))

    def _end(self, trial: FrozenTrial) -> str:
        if trial.state == TrialState.COMPLETE:
            cost = "" if self.config.cost is None else f", {self.config.cost} {cost_of(trial):.4g}"
            return f"done: {self.metric} {score_of(trial):.4f}{cost}"
        if "oom_where" in trial.user_attrs:
            return f"pruned: out of memory in {trial.user_attrs['oom_where']}"
        if trial.state == TrialState.PRUNED:
            at = trial.user_attrs.get("pruned_at", trial.last_step)
            value = trial.intermediate_values.get(trial.last_step) if trial.last_step else None
            shown = "no value" if value is None else f"{self.metric} {value:.4f}"
            how = "paused" if PAUSED_AT in trial.user_attrs else "pruned"
            return f"{how} at step {at} of {self.n_reports}: {shown}"
        if INTERRUPTED in trial.user_attrs:
            return f"interrupted: {trial.user_attrs[INTERRUPTED]}"
        return f"failed: {trial.user_attrs.get(ERROR, 'its process is gone')}"

    def _best(self, study: optuna.Study, trial: FrozenTrial) -> str:
        found = ranked(study)
        if not found:
            return "no trial complete yet"
        size = "" if self.config.cost is None else f", Pareto front of {len(front(study))}"
        return f"best {score_of(found[0]):.4f} (trial {found[0].number}){size}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
