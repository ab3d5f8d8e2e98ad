from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from lightning_bge.hpo.analysis.history import StudyGoal
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.scheduling.trial_queue import CHECKPOINTS
from lightning_bge.hpo.space.draw import SamplerConfig
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.storage.workers import Worker
from lightning_bge.hpo.study import open_study, study_storage
from lightning_bge.hpo.trials import ERROR, INTERRUPTED, NOT_TRAINED, WORKER, WORKER_LOST
from tests.helpers.made_study import START, journal_of, new_study
from tests.helpers.past_study import complete, history_at, study_of
from tests.helpers.small_search import SPACE, make, write_files
from tests.helpers.study_run import run_study

optuna.logging.set_verbosity(optuna.logging.WARNING)
GONE = {"id": "gone", "host": "here", "pid": 7}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real study of six parameter sets, some of which were paused and resumed."""
    folder = write_files(tmp_path_factory.mktemp("search"))
    config = StudyConfig(6, SPACE, pruner=PrunerConfig("asha", 2, 1), sampler=SamplerConfig("random"))
    settings = {"monitor.metric": "loss", "monitor.objective": "best", "data.split.folds": 2, "trainer.max_epochs": 2}
    study = open_study(study_storage(folder / "run", config), config, "minimize", Steps(2, 2), settings)
    (folder / "run" / "config.yaml").write_text("hpo: {n_trials: 6, pruner: {name: asha}}")
    objective = make(folder, paused_dir=folder / "run" / CHECKPOINTS, n_trials=6)
    run_study(study, objective, config, folder / "run")
    return folder / "run"


def test_a_real_search_is_read_as_optuna_has_it(searched: Path) -> None:
    study = optuna.load_study(study_name="run", storage=journal_of(searched))
    history = history_at(searched)
    assert history.goal == StudyGoal("loss", "minimize")
    assert (history.steps, history.n_trials, history.pruner) == (Steps(2, 2), 6, "asha")
    assert history.best is not None
    assert history.best.number == study.best_trial.number
    assert history.n_finished == 6
    assert not history.is_running
    for mine, its in zip(history.trials, study.trials, strict=True):
        assert (mine.number, mine.params, mine.values) == (its.number, its.params, its.intermediate_values)
        assert (mine.start, mine.end) == (its.datetime_start, its.datetime_complete)
        assert mine.value == (its.value if its.state == TrialState.COMPLETE else None)
        assert mine.outcome in {TrialState.COMPLETE: ["complete"], TrialState.PRUNED: ["paused", "resumed"]}[its.state]
        assert [[list(one) for one in fold] for fold in mine.curve] == its.user_attrs["curve"]
    resumed = [trial for trial in history.trials if trial.resumes is not None]
    assert resumed
    for trial in resumed:
        assert history.trials[trial.resumes].outcome == "resumed"


@pytest.mark.parametrize(
    ("state", "attributes", "outcome", "note"),
    [
        (TrialState.PRUNED, {"pruned_at": 1}, "pruned", ""),
        (TrialState.PRUNED, {"pruned_at": 1, "paused_at": 1}, "paused", ""),
        (TrialState.PRUNED, {"pruned_at": 1, "nan": "nan"}, "diverged", "nan"),
        (TrialState.PRUNED, {"oom_where": "training", "oom_requested": 5}, "out of memory", "in training"),
        (TrialState.FAIL, {}, "failed", ""),
        (TrialState.FAIL, {ERROR: "ValueError: x"}, "failed", "ValueError: x"),
        (TrialState.FAIL, {WORKER_LOST: "process 7 on here is gone"}, "interrupted", "process 7 on here is gone"),
        (TrialState.FAIL, {INTERRUPTED: "SIGTERM"}, "interrupted", "SIGTERM"),
        (TrialState.FAIL, {WORKER_LOST: "it is gone", ERROR: "3 workers died"}, "failed", "3 workers died"),
        (TrialState.FAIL, {NOT_TRAINED: "its parameter set was there"}, "left out", "its parameter set was there"),
        (TrialState.WAITING, {}, "waiting", ""),
        (TrialState.RUNNING, {WORKER: GONE}, "interrupted", "process 7 on here is gone"),
        (TrialState.RUNNING, {}, "interrupted", "no process has marked it"),
    ],
)
def test_the_outcome_of_a_trial(
    tmp_path: Path, state: TrialState, attributes: dict[str, Any], outcome: str, note: str
) -> None:
    study = new_study(tmp_path / "run", 5)
    trial = create_trial(state=state, user_attrs=attributes)
    trial.datetime_start = None if state == TrialState.WAITING else START
    trial.datetime_complete = START if state.is_finished() else None
    study.add_trial(trial)
    [found] = history_at(tmp_path / "run").trials
    assert found.outcome == outcome
    assert found.note.startswith(note)
    assert bool(note) == bool(found.note)


def test_a_trial_is_running_while_its_worker_lives(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Worker(run_dir) as worker:
        new_study(run_dir, 5).add_trial(create_trial(state=TrialState.RUNNING, user_attrs={WORKER: worker.record}))
        assert [(trial.outcome, trial.note) for trial in history_at(run_dir).trials] == [("running", "")]
        assert history_at(run_dir).is_running
    [found] = history_at(run_dir).trials
    assert (found.outcome, found.note) == (
        "interrupted",
        f"process {worker.record['pid']} on {worker.record['host']} is gone",
    )
    assert not history_at(run_dir).is_running


def test_a_parameter_set_that_was_continued_counts_once(tmp_path: Path) -> None:
    study = new_study(tmp_path / "run", 5)
    study.add_trial(create_trial(state=TrialState.PRUNED, user_attrs={"paused_at": 1}))
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={WORKER_LOST: "it is gone"}))
    study.add_trial(create_trial(value=0.5, user_attrs={"parameter_set": 0, "resumes": 0}))
    study.add_trial(create_trial(value=0.6, user_attrs={"parameter_set": 1, "retry_of": 1}))
    history = history_at(tmp_path / "run")
    assert [trial.outcome for trial in history.trials] == ["resumed", "interrupted", "complete", "complete"]
    assert [trial.parameter_set for trial in history.trials] == [0, 1, 0, 1]
    assert history.n_finished == 2


def test_a_study_is_running_while_a_seed_replicate_runs(tmp_path: Path) -> None:
    new_study(tmp_path / "run", 5)
    replicates = optuna.create_study(study_name="run-seed-replicates", storage=journal_of(tmp_path / "run"))
    with Worker(tmp_path / "run") as worker:
        known = {WORKER: worker.record, "replicate_of": 0, "seed": 1}
        replicates.add_trial(create_trial(state=TrialState.RUNNING, user_attrs=known))
        history = history_at(tmp_path / "run")
    assert [trial.outcome for trial in history.seed_replicates] == ["running"]
    assert history.is_running
    assert datetime.now() - history.read_at < timedelta(minutes=5)


def test_of_equal_scores_the_cheaper_trial_is_the_better() -> None:
    history = study_of(complete(0, 0.5, 3.0), complete(1, 0.5, 2.0), complete(2, 0.4, 1.0))
    assert [trial.number for trial in history.ranked] == [1, 0, 2]
