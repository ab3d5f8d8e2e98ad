"""Recordings of real searches."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from lightning_bge.errors import StudyError
from lightning_bge.hpo.forecast.recording import Recording, record_study
from tests.helpers.small_search import make, write_files

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> optuna.Study:
    objective = make(write_files(tmp_path_factory.mktemp("search")), per_epoch=2)
    study = optuna.create_study(direction="minimize", sampler=optuna.samplers.RandomSampler(seed=1), study_name="s")
    study.optimize(objective, n_trials=3)
    return study


def test_a_recording_holds_what_the_study_reported(searched: optuna.Study, tmp_path: Path) -> None:
    found = record_study(searched, "small", 2, 2, 2, rows=40)
    assert (found.direction, found.n_steps, found.about) == ("minimize", 8, {"rows": 40})
    for curve, trial in zip(found.trials, searched.trials, strict=True):
        assert curve.values == pytest.approx(list(trial.intermediate_values.values()), abs=1e-6)
        assert curve.value == trial.value
        assert curve.params == trial.params
        assert all(a >= b >= 0 for a, b in zip(curve.seconds, curve.validation, strict=True))
        assert 0 < sum(curve.seconds) <= trial.duration.total_seconds()
    assert found.best == searched.best_value
    found.save(tmp_path / "small.json")
    assert Recording.load(tmp_path / "small.json") == found


def test_a_coarser_recording_is_that_of_fewer_reports(searched: optuna.Study) -> None:
    fine = record_study(searched, "small", 2, 2, 2)
    coarse = fine.coarser(1)
    for curve, once in zip(fine.trials, coarse.trials, strict=True):
        assert once.values == curve.values[1::2]
        assert sum(once.seconds) == pytest.approx(sum(curve.seconds) - sum(curve.validation[0::2]))
    with pytest.raises(StudyError, match="does not divide"):
        fine.coarser(3)


def test_what_cannot_be_recorded(searched: optuna.Study, tmp_path: Path) -> None:
    pruned = optuna.create_study()
    pruned.add_trial(optuna.trial.create_trial(state=TrialState.PRUNED, intermediate_values={1: 0.5}))
    with pytest.raises(StudyError, match="was pruned: record a search without pruning"):
        record_study(pruned, "p", 1, 2, 1)
    old = optuna.create_study()
    old.add_trial(optuna.trial.create_trial(value=0.5))
    with pytest.raises(StudyError, match="no record of its seconds"):
        record_study(old, "o", 1, 2, 1)
    with pytest.raises(StudyError, match="expected a recording of schema version"):
        Recording.load(tmp_path / "missing.json")
    (tmp_path / "other.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(StudyError, match="expected a recording of schema version"):
        Recording.load(tmp_path / "other.json")
