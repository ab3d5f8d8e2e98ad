"""The pruners of this package against slow plain versions, and the values that Optuna's pruners get from them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.pruners import BasePruner, WilcoxonPruner
from scipy.stats import wilcoxon

from lightning_bge.hpo.pruning.config import PrunerConfig, build_pruner
from lightning_bge.hpo.pruning.pruners import (
    FoldEndPruner,
    FoldWilcoxonPruner,
    StartupTrialsPruner,
    WarmupPruner,
    fold_scores,
)
from lightning_bge.hpo.steps import Steps
from tests.helpers.curve_study import run

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Always(BasePruner):
    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return True


def running_means(folds: Any) -> np.ndarray:
    """Reports of trials [N, folds, reports of a fold]: means of the folds' last values and the fold at hand."""
    before = np.cumsum(folds[:, :, -1], axis=1) - folds[:, :, -1]
    means = (before[:, :, None] + folds) / np.arange(1, folds.shape[1] + 1)[None, :, None]
    return means.reshape(len(folds), -1)


def test_fold_scores_from_running_means() -> None:
    folds = np.random.default_rng(0).uniform(size=(1, 4, 3))
    study = optuna.create_study()
    trial = study.ask()
    for step, value in enumerate(running_means(folds)[0], start=1):
        trial.report(float(value), step)
        found = fold_scores(study.trials[0], 3)
        assert (found is None) == (step % 3 > 0)
        if found is not None:
            assert found == pytest.approx(folds[0, : step // 3, -1])


def test_wilcoxon_is_given_one_value_a_fold_and_first_acts_after_the_fourth() -> None:
    rng = np.random.default_rng(0)
    folds = rng.uniform(0.5, 0.9, (30, 1, 1)) + rng.normal(0, 0.02, (30, 6, 2))
    got = run(FoldWilcoxonPruner(2), running_means(folds))
    expected: list[int | None] = []
    best: np.ndarray | None = None
    for scores in folds[:, :, -1]:
        at = None
        for k in range(2, 6):
            if best is None or at is not None:
                continue
            p = wilcoxon(scores[:k] - best[:k], alternative="less", zero_method="zsplit").pvalue
            if p < 0.1 and not best.mean() <= scores[:k].mean():
                at = 2 * k
        if at is None and (best is None or scores.mean() > best.mean()):
            best = scores
        expected.append(at)
    assert got == expected
    assert {step for step in got if step is not None} <= {8, 10}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_trap_wilcoxon_on_running_means_takes_epochs_for_samples() -> None:
    rng = np.random.default_rng(0)
    folds = rng.uniform(0.5, 0.9, (60, 1, 1)) + rng.normal(0, 0.02, (60, 5, 5))
    bare = run(WilcoxonPruner(p_threshold=0.1), running_means(folds))
    assert sum(step is not None and step < 10 for step in bare) > 40  # most, before the second fold has ended
    ours = run(build_pruner(PrunerConfig(name="wilcoxon"), 60, Steps(5, 5)), running_means(folds))
    assert {step for step in ours if step is not None} == {20}


def test_between_folds_the_mean_and_its_uncertainty_decide() -> None:
    rng = np.random.default_rng(1)
    folds = rng.uniform(0.5, 0.9, (40, 1, 1)) + rng.normal(0, 0.01, (1, 4, 1)) + rng.normal(0, 0.03, (40, 4, 3))
    got = run(FoldEndPruner(None, 3, 4, 0.9), running_means(folds))
    done: list[np.ndarray] = []
    expected: list[int | None] = []
    for scores in folds[:, :, -1]:
        at = None
        for k in (1, 2, 3):
            if len(done) < 2 or at is not None:
                continue
            best = max(done, key=lambda one: one.mean())
            others = [one - best for one in done if one is not best]
            spread = math.sqrt(np.mean([np.var(one, ddof=1) for one in others]))
            room = 1.2815515655 * spread * math.sqrt((4 - k) / (4 * k))
            if (scores[:k] - best[:k]).mean() + room < 0:
                at = 3 * k
        if at is None:
            done.append(scores)
        expected.append(at)
    assert got == expected
    assert {3, 6} <= set(got)


def test_the_room_between_folds_is_the_spread_of_what_is_to_come() -> None:
    """The rule's interval holds as often as it says, for differences that are normal."""
    rng = np.random.default_rng(0)
    folds, k, spread = 5, 2, 0.05
    differences = rng.normal(0, 1, (20_000, 1)) * 0.1 + rng.normal(0, spread, (20_000, folds))
    ahead = differences.mean(axis=1) - differences[:, :k].mean(axis=1)
    room = 1.2815515655 * spread * math.sqrt((folds - k) / (folds * k))
    assert np.mean(ahead > room) == pytest.approx(0.1, abs=0.01)


def test_the_pruner_inside_a_fold_is_asked_too() -> None:
    class Recorder(BasePruner):
        def __init__(self) -> None:
            self.asked: list[int] = []

        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            self.asked.append(trial.last_step or 0)
            return False

    inner = Recorder()
    run(FoldEndPruner(inner, 2, 3), [[0.5] * 6])
    assert inner.asked == [1, 2, 3, 4, 5]


def test_nothing_is_pruned_in_the_first_steps_of_each_fold() -> None:
    asked: list[int] = []

    class Recorder(BasePruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            asked.append(trial.last_step or 0)
            return False

    run(WarmupPruner(Recorder(), 3, 2), [[0.5] * 9])
    assert asked == [3, 6]
    asked.clear()
    run(WarmupPruner(Recorder(), 3, 1), [[0.5] * 9])
    assert asked == [2, 3, 5, 6, 8]
    assert run(WarmupPruner(Always(), 3, 2), [[0.5] * 9]) == [3]


def test_nothing_is_pruned_until_the_startup_trials_have_run_to_their_end() -> None:
    values = -np.arange(30.0)[:, None] + np.zeros((30, 8))
    assert run(StartupTrialsPruner(Always(), 7), values) == [None] * 7 + [1] * 23
