"""Pruners for any Optuna study whose trials report at the consecutive steps 1..n of their folds.

A trial's value at a step is the mean over its folds so far, the last of them up to that step (`FoldPruningCallback`).
"""

import copy
import math
import warnings
from itertools import pairwise
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, WilcoxonPruner
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.ranking import sign_of


class StartupTrialsPruner(BasePruner):
    """Prune nothing until `n_startup_trials` trials of the study have run to their end; then ask the inner pruner.

    Optuna's `bootstrap_count` does the opposite: it prunes the first trials that reach a rung. The inner pruner is
    asked during the start-up too and its answer ignored, because Hyperband records a trial's value at a rung only when
    it is asked. A trial that is pruned for another reason (out of memory, a metric that is NaN) does not count.

    Args:
        inner: the pruner that decides after the start-up.
        n_startup_trials: number of COMPLETE trials before anything is pruned.
    """

    def __init__(self, inner: BasePruner, n_startup_trials: int) -> None:
        self.inner = inner
        self.n_startup_trials = n_startup_trials

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether to stop the trial at its last step."""
        if not self.inner.prune(study, trial):
            return False
        return len(completed(study)) >= self.n_startup_trials


class WarmupPruner(BasePruner):
    """Prune nothing in the first steps of each fold.

    A fold starts with fresh weights, a low learning rate and a new head, and its first values say little: in recorded
    searches trials that learned nothing had higher values there than the later winners.

    Args:
        inner: the pruner that decides at the later steps.
        per_fold: steps of a fold.
        n_warmup_steps: nothing is pruned in the first so many of them.
    """

    def __init__(self, inner: BasePruner, per_fold: int, n_warmup_steps: int) -> None:
        self.inner = inner
        self.per_fold, self.n_warmup_steps = per_fold, n_warmup_steps

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether to stop the trial at its last step."""
        step = trial.last_step
        return step is not None and (step - 1) % self.per_fold >= self.n_warmup_steps and self.inner.prune(study, trial)


def completed(study: optuna.Study) -> list[FrozenTrial]:
    """The study's COMPLETE trials, not copied."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


class FoldEndPruner(BasePruner):
    """Between folds decide on the running mean and its uncertainty; inside a fold ask the inner pruner.

    All trials see the same folds, order and seeds, so a trial's folds are compared with the same folds of the best
    complete trial. With d the mean difference over the k folds so far, s the spread of such differences between folds
    (pooled over the complete trials) and K folds in all, the mean over all folds will be within
    d +- z s sqrt((K - k) / (K k)). A trial whose upper end is below zero is stopped: more folds are not expected to
    lift it to the best one.

    Args:
        inner: decides inside a fold, and is asked at its end too; None: nothing is pruned inside a fold.
        per_fold: steps of a fold.
        folds: K.
        confidence: one-sided, 0.5 to 1; with 0.9 (z = 1.28) one decision in ten at a fold's end is wrong.
    """

    def __init__(self, inner: BasePruner | None, per_fold: int, folds: int, confidence: float = 0.9) -> None:
        self.inner = inner
        self.per_fold, self.folds, self.confidence = per_fold, folds, confidence

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether to stop the trial at its last step."""
        if self.inner is not None and self.inner.prune(study, trial):
            return True
        scores = fold_scores(trial, self.per_fold)
        if scores is None:
            return False
        done = [found for other in completed(study) if (found := fold_scores(other, self.per_fold)) is not None]
        done = [found for found in done if len(found) == self.folds]
        if len(done) < 2:
            return False
        sign = sign_of(study)
        table = sign * np.array(done)
        best = table[table.mean(axis=1).argmax()]
        spread = math.sqrt(float(np.mean(np.var(table - best, axis=1, ddof=1)) * len(done) / (len(done) - 1)))
        k, folds = len(scores), self.folds
        room = NormalDist().inv_cdf(self.confidence) * spread * math.sqrt((folds - k) / (folds * k))
        return float(np.mean(sign * np.array(scores) - best[:k])) + room < 0


class FoldWilcoxonPruner(BasePruner):
    """Optuna's `WilcoxonPruner`, given what it is made for: one value a fold, each fold's own score.

    Fed with running means it would take epochs for samples. Its one-sided p is at least 2**-n after n folds, so at the
    default p < 0.1 it first acts after the fourth fold.

    Args:
        per_fold: steps of a fold.
        p_threshold: as Optuna's WilcoxonPruner has it.
    """

    def __init__(self, per_fold: int, p_threshold: float = 0.1) -> None:
        self.per_fold = per_fold
        with warnings.catch_warnings():  # Optuna calls it experimental; the tests cover what is used here
            warnings.simplefilter("ignore", ExperimentalWarning)
            self.inner = WilcoxonPruner(p_threshold=p_threshold)

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether to stop the trial at its last step."""
        mine, done = self._by_fold(trial), completed(study)
        if mine is None or not done:
            return False
        best = self._by_fold(study.best_trial)
        assert best is not None
        view: Any = SimpleNamespace(direction=study.direction, best_trial=best)
        return self.inner.prune(view, mine)

    def _by_fold(self, trial: FrozenTrial) -> FrozenTrial | None:
        scores = fold_scores(trial, self.per_fold)
        if scores is None:
            return None
        found = copy.copy(trial)
        found.intermediate_values = dict(enumerate(scores))
        return found


def fold_scores(trial: FrozenTrial, per_fold: int) -> list[float] | None:
    """The scores of the trial's finished folds where its last step is the end of a fold, else None."""
    folds, rest = divmod(trial.last_step or 0, per_fold)
    if rest or not folds:
        return None
    sums = [0.0, *(k * trial.intermediate_values[k * per_fold] for k in range(1, folds + 1))]
    return [after - before for before, after in pairwise(sums)]
