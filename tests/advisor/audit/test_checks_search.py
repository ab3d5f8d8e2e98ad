"""Planted defects of a hyperparameter search: its pruner can never act, or not all folds report."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import optuna
import pytest
from optuna.pruners import HyperbandPruner, MedianPruner
from optuna_integration import PyTorchLightningPruningCallback
from torch import Tensor

from lightning_bge.advisor.audit.checks_search import audit_objective, pruning, search_rows
from lightning_bge.advisor.audit.result import Row
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.callback import FoldPruningCallback
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Steps
from tests.helpers.foreign_modules import Classifier, loader


def folds_objective(folds: int, epochs: int, report: str) -> Any:
    """An objective over folds that reports by Optuna's callback, by FoldPruningCallback, or at the end."""

    def objective(trial: optuna.Trial) -> float:
        scores: list[float] = []
        for fold in range(folds):
            callbacks: list[L.Callback] = []
            if report == "optuna":
                callbacks = [PyTorchLightningPruningCallback(trial, "val_score")]
            elif report == "folds":
                callbacks = [FoldPruningCallback(trial, "val_score", fold, folds, epochs, scores)]
            trainer = L.Trainer(
                max_epochs=epochs,
                callbacks=callbacks,
                accelerator="cpu",
                limit_train_batches=1,
                **dict.fromkeys(
                    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
                ),
            )
            trainer.fit(Scored(), loader(rows=8), loader(rows=8))
            if report == "folds":
                scores.append(callbacks[0].close_fold())  # type: ignore[attr-defined]
            else:
                scores.append(float(trainer.callback_metrics["val_score"]))
        if report == "end":
            trial.report(sum(scores), 0)
            trial.should_prune()
        return sum(scores) / folds

    return objective


class Scored(Classifier):
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_score", -self.loss(batch), batch_size=8)


def search_alarms(objective: Any, pruner: Any, folds: int) -> dict[str, Row]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        rows = audit_objective(objective, pruner, n_trials=94, folds=folds)
    return {row.name: row for row in rows if row.alarm}


def test_a_configured_pruner_that_can_never_act() -> None:
    row = pruning(StudyConfig(n_trials=94, pruner=PrunerConfig("hyperband")), Steps(1, 1))
    assert row.verdict == "mismatch"
    assert "could never prune" in row.evidence


def test_a_pruner_that_can_never_act_on_one_report_at_the_end() -> None:
    wrong = search_alarms(folds_objective(2, 1, "end"), HyperbandPruner(1, 5, 4), 2)
    assert wrong["pruning"].in_effect == "never"
    assert "1 steps" in wrong["pruning"].evidence


def test_only_the_first_of_five_folds_reports() -> None:
    wrong = search_alarms(folds_objective(5, 2, "optuna"), MedianPruner(), 5)
    assert list(wrong) == ["fold-level pruning"]
    assert "8 ignored" in wrong["fold-level pruning"].evidence


def test_only_the_last_value_of_the_folds_reports() -> None:
    assert "fold-level pruning" in search_alarms(folds_objective(3, 1, "end"), MedianPruner(), 3)


def test_a_sound_objective_raises_no_alarm() -> None:
    assert not search_alarms(folds_objective(3, 2, "folds"), MedianPruner(n_startup_trials=2), 3)


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_pruners_of_this_package_raise_no_alarm(name: Any) -> None:
    rows = search_rows(StudyConfig(n_trials=60, pruner=PrunerConfig(name)), Steps(3, 4))
    assert not [row for row in rows if row.alarm]
