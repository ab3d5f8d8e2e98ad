from __future__ import annotations

import json
import os
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from lightning_bge.errors import StudyError
from lightning_bge.hpo.analysis.journal import TAKEN_OVER, load_study
from tests.helpers.made_study import journal_of, make_study, new_study
from tests.helpers.past_study import history_at

optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_reading_writes_nothing_and_leaves_out_an_incomplete_last_line(tmp_path: Path) -> None:
    run = make_study(tmp_path / "run", 6)
    journal = run / "journal.log"
    whole, before = journal.read_bytes(), history_at(run)
    try:
        for end in (b"{", b'{"op_code":7,"worker_id":"a"', b"not a record\n"):
            journal.write_bytes(whole + end)
            files = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
            os.chmod(journal, 0o400)
            assert history_at(run).trials == before.trials
            assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == files
            os.chmod(journal, 0o600)
        journal.write_bytes(b"not a record\n" + whole)
        with pytest.raises(StudyError, match="line 1 is not a record of the journal"):
            load_study(run)
    finally:
        journal.write_bytes(whole)


def test_a_study_that_was_just_created_is_not_loaded(tmp_path: Path) -> None:
    assert load_study(tmp_path) is None
    (tmp_path / "journal.log").write_text("")
    assert load_study(tmp_path) is None
    (tmp_path / "journal.log").unlink()
    study = optuna.create_study(study_name=tmp_path.name, storage=journal_of(tmp_path))
    assert load_study(tmp_path) is None
    study.set_user_attr("space", {})
    study.set_user_attr("settings", {})
    assert load_study(tmp_path) is None
    study.set_user_attr("steps", {"folds": 5, "epochs": 3, "per_epoch": 1})
    with pytest.raises(StudyError, match="does not name its metric"):
        load_study(tmp_path)


def test_a_folder_that_was_renamed_is_read(tmp_path: Path) -> None:
    make_study(tmp_path / "before", 5)
    (tmp_path / "before").rename(tmp_path / "after")
    assert len(history_at(tmp_path / "after").trials) >= 5


def test_the_last_study_of_a_journal_is_read_with_its_own_seed_replicates(tmp_path: Path) -> None:
    """A changed search space begins another study."""
    study = new_study(tmp_path / "run", 5)
    storage = journal_of(tmp_path / "run")
    optuna.create_study(storage=storage, study_name="run-seed-replicates").add_trial(create_trial(value=0.1))
    later = optuna.create_study(storage=storage, study_name="run-space-2", direction="maximize")
    for name, value in study.user_attrs.items():
        later.set_user_attr(name, value)
    loaded = load_study(tmp_path / "run")
    assert loaded is not None
    assert loaded[0].study_name == "run"  # until all trials are taken over
    later.set_user_attr(TAKEN_OVER, True)
    later.add_trial(create_trial(value=0.5))
    loaded = load_study(tmp_path / "run")
    assert loaded is not None
    assert (loaded[0].study_name, [trial.value for trial in loaded[0].trials], loaded[1]) == ("run-space-2", [0.5], [])
    replicates = optuna.create_study(storage=storage, study_name="run-space-2-seed-replicates")
    replicates.add_trial(create_trial(value=0.2))
    loaded = load_study(tmp_path / "run")
    assert loaded is not None
    assert loaded[0].study_name == "run-space-2"
    assert [trial.value for trial in loaded[1]] == [0.2]


def test_the_made_up_journal_is_one_of_optuna(tmp_path: Path) -> None:
    make_study(tmp_path / "run", 30)
    trials = optuna.load_study(study_name="run", storage=journal_of(tmp_path / "run")).trials
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert all(json.dumps(trial.user_attrs) for trial in trials)


def test_a_journal_that_is_gone_is_not_a_run_without_a_study(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("hpo: {n_trials: 3}\n")
    with pytest.raises(StudyError, match=r"expected journal\.log, as its config\.yaml is that of a study"):
        load_study(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {task: binary}\n")  # of a `fit`
    assert load_study(tmp_path) is None
