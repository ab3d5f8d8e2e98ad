from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from lightning_bge.hpo.analysis.history import TrialResult
from lightning_bge.hpo.analysis.importance import parameter_importance
from tests.helpers.made_study import make_study
from tests.helpers.past_study import history_at

optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_importance_finds_the_hyperparameter_that_matters_and_gives_a_reason_where_it_cannot(tmp_path: Path) -> None:
    history = history_at(make_study(tmp_path / "run", 700))
    assert len(history.ranked) >= 20
    shares, note = parameter_importance(history)
    assert next(iter(shares)) == "model.optimizer.lr"
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert "Left out, as some complete trials do not use them: model.loss.focal_gamma" in note
    assert parameter_importance(history) == (shares, note)  # a fixed seed
    few = replace(history, trials=tuple(history.ranked[:9]))
    assert parameter_importance(few) == ({}, "Importance needs 10 complete trials; the study has 9.")
    flat = tuple(replace(trial, result=TrialResult(0.5)) for trial in history.ranked)
    assert "have the same score" in parameter_importance(replace(history, trials=flat))[1]
