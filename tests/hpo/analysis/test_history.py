from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState, create_trial

from lightning_bge.errors import StudyError
from lightning_bge.hpo.analysis.history import History, PastTrial, StudyGoal, TrialResult, history_of
from lightning_bge.hpo.analysis.hours import StudyClock, best_over_hours, hours_saved
from lightning_bge.hpo.analysis.importance import parameter_importance
from lightning_bge.hpo.analysis.journal import load_study
from lightning_bge.hpo.analysis.time_left import time_left
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.forecast.eta import Eta
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Report, Steps
from lightning_bge.hpo.study import open_study, run_study
from tests.helpers.made_study import START, journal_of, make_study, new_study
from tests.helpers.small_search import SPACE, make, write_files

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real study of six parameter sets, some of which were paused and resumed."""
    folder = write_files(tmp_path_factory.mktemp("search"))
    config = StudyConfig(6, SPACE, pruner=PrunerConfig("asha", 2, 1), sampler="random")
    settings = {"monitor.metric": "loss", "monitor.objective": "best", "data.split.folds": 2, "trainer.max_epochs": 2}
    study = open_study(folder / "run", config, "minimize", Steps(2, 2), settings)
    (folder / "run" / "config.yaml").write_text("hpo: {n_trials: 6, pruner: {name: asha}}")
    objective = make(folder, paused_dir=folder / "run" / "paused", n_trials=6)
    run_study(study, objective, config, "loss", 4, folder / "run" / "paused")
    return folder / "run"


def read(run_dir: Path) -> History:
    loaded = load_study(run_dir)
    assert loaded is not None
    return history_of(*loaded, options_of(run_dir))


def options_of(run_dir: Path) -> dict[str, Any]:
    return yaml.safe_load((run_dir / "config.yaml").read_text())["hpo"]


def left(run_dir: Path) -> Eta | None:
    loaded = load_study(run_dir)
    assert loaded is not None
    return time_left(*loaded, options_of(run_dir))


def test_a_real_search_is_read_as_optuna_has_it(searched: Path) -> None:
    study = optuna.load_study(study_name="run", storage=journal_of(searched))
    history = read(searched)
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


def test_reading_writes_nothing_and_leaves_out_an_incomplete_last_line(searched: Path) -> None:
    journal = searched / "journal.log"
    whole, before = journal.read_bytes(), read(searched)
    try:
        for end in (b"{", b'{"op_code":7,"worker_id":"a"', b"not a record\n"):
            journal.write_bytes(whole + end)
            files = {path: path.stat().st_mtime_ns for path in searched.rglob("*")}
            os.chmod(journal, 0o400)
            assert read(searched).trials == before.trials
            assert {path: path.stat().st_mtime_ns for path in searched.rglob("*")} == files
            os.chmod(journal, 0o600)
        journal.write_bytes(b"not a record\n" + whole)
        with pytest.raises(StudyError, match="line 1 is not a record of the journal"):
            load_study(searched)
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
    assert len(read(tmp_path / "after").trials) >= 5


@pytest.mark.parametrize(
    ("state", "attributes", "outcome", "note"),
    [
        (TrialState.PRUNED, {"pruned_at": 1}, "pruned", ""),
        (TrialState.PRUNED, {"pruned_at": 1, "paused_at": 1}, "paused", ""),
        (TrialState.PRUNED, {"pruned_at": 1, "nan": "nan"}, "diverged", "nan"),
        (TrialState.PRUNED, {"oom_where": "training", "oom_requested": 5}, "out of memory", "in training"),
        (TrialState.FAIL, {}, "failed", ""),
        (TrialState.FAIL, {"swept": "process 7 is gone"}, "interrupted", "process 7 is gone"),
        (TrialState.WAITING, {}, "waiting", ""),
        (TrialState.RUNNING, {"worker": {"host": "another"}}, "running", ""),
        (TrialState.RUNNING, {}, "interrupted", "no worker recorded"),
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
    [found] = read(tmp_path / "run").trials
    assert found.outcome == outcome
    assert found.note.startswith(note)
    assert bool(note) == bool(found.note)


# ---------------------------------------------------------------------- what follows


def past(number: int, outcome: Any = "complete", start: float = 0.0, end: float = 1.0, **more: Any) -> PastTrial:
    return PastTrial(number, outcome, START + timedelta(hours=start), START + timedelta(hours=end), **more)


def complete(number: int, value: float, cost: float | None = None, start: float = 0.0, end: float = 1.0) -> PastTrial:
    return past(number, "complete", start, end, result=TrialResult(value, cost))


def made(*trials: PastTrial, direction: Any = "maximize", **more: Any) -> History:
    known: dict[str, Any] = {"goal": StudyGoal("f1", direction), "steps": Steps(2, 3), "n_trials": 9}
    known |= {"pruner": "asha", "space": {}, "seed_replicates": (), "read_at": START + timedelta(hours=24)}
    return History(**{**known, "trials": trials, **more})


def test_hours_count_once_where_trials_run_side_by_side_and_not_between_them() -> None:
    running = past(3, "running", 22, end=0)
    running = PastTrial(3, "running", running.start)
    died = PastTrial(4, "interrupted", START + timedelta(hours=5))
    clock = StudyClock(made(past(0, start=0, end=2), past(1, start=1, end=3), past(2, start=10, end=11), running, died))
    assert clock.hours() == pytest.approx(3 + 1 + 2)
    for hour, hours in ((-1, 0), (0, 0), (1.5, 1.5), (3, 3), (7, 3), (10.5, 3.5), (23, 5), (30, 6)):
        assert clock.hours(START + timedelta(hours=hour)) == pytest.approx(hours)
    assert StudyClock(made()).hours() == 0


@pytest.mark.parametrize(("direction", "numbers"), [("maximize", [0, 2]), ("minimize", [0, 1])])
def test_the_best_so_far(direction: str, numbers: list[int]) -> None:
    values = [0.5, 0.4, 0.6, 0.6]
    trials = [complete(n, value, start=n, end=n + 1) for n, value in enumerate(values)]
    found = best_over_hours(made(*trials, past(4, "paused", 4, 5), direction=direction))
    assert [trial.number for _, trial in found] == numbers
    assert [hours for hours, _ in found] == [number + 1 for number in numbers]


def test_of_equal_scores_the_cheaper_trial_is_the_better() -> None:
    history = made(complete(0, 0.5, 3.0), complete(1, 0.5, 2.0), complete(2, 0.4, 1.0))
    assert [trial.number for trial in history.ranked] == [1, 0, 2]


def curve(seconds: float, *steps: int) -> tuple[tuple[Report, ...], ...]:
    return (tuple(Report(step, 0.5, 0.75 * seconds, 0.25 * seconds, 0.0, 0.0) for step in steps),)


def test_hours_saved_are_the_missing_steps_at_the_seconds_per_step_of_each_trial() -> None:
    one = past(0, "paused", values={1: 0.1, 2: 0.2}, curve=curve(3600, 1, 2))  # 4 of 6 are missing, an hour each
    two = past(1, "pruned", values={3: 0.1}, curve=curve(1800, 1, 2, 3))  # 3 of 6, half an hour each
    on = past(2, "resumed", values={1: 0.1}, curve=curve(3600, 1))
    unknown = past(3, "paused", values={1: 0.1})
    oom = past(4, "out of memory", values={1: 0.1}, curve=curve(3600, 1))
    found = hours_saved(made(one, two, on, unknown, oom, complete(5, 0.1), PastTrial(6, "running", START)))
    assert found.saved == pytest.approx(4 * 1 + 3 * 0.5)
    assert (found.spent, found.trials, found.unknown) == (pytest.approx(6), 2, 1)
    # two steps share one validation where an epoch has fewer batches than parts
    skipped = past(0, "paused", values={1: 0.1, 2: 0.1}, curve=curve(3600, 2))
    assert hours_saved(made(skipped)).saved == pytest.approx(4 * 0.5)


def test_importance_finds_the_hyperparameter_that_matters_and_gives_a_reason_where_it_cannot(tmp_path: Path) -> None:
    history = read(make_study(tmp_path / "run", 700))
    assert len(history.ranked) >= 20
    shares, note = parameter_importance(history)
    assert next(iter(shares)) == "model.optimizer.lr"
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert "Left out, as some complete trials do not use them: model.loss.focal_gamma" in note
    assert parameter_importance(history) == (shares, note)  # a fixed seed
    few = replace(history, trials=tuple(history.ranked[:9]))
    assert parameter_importance(few) == ({}, "Importance needs 10 complete trials; so far there are 9.")
    flat = tuple(replace(trial, result=TrialResult(0.5)) for trial in history.ranked)
    assert "have the same score" in parameter_importance(replace(history, trials=flat))[1]


def test_the_time_left_is_known_when_something_runs_and_something_has_ended(tmp_path: Path) -> None:
    eta = left(make_study(tmp_path / "running", 40, running=True))
    assert eta is not None
    assert 0 < eta.low <= eta.mid <= eta.high
    assert left(make_study(tmp_path / "ended", 10)) is None
    (tmp_path / "running" / "config.yaml").write_text("hpo: {}")
    assert left(tmp_path / "running") is None
    study = new_study(tmp_path / "first", 5)
    study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={"worker": {"host": "another"}}))
    assert left(tmp_path / "first") is None


def test_a_study_is_running_while_a_seed_replicate_runs(tmp_path: Path) -> None:
    study = new_study(tmp_path / "run", 5)
    again = optuna.create_study(study_name="run-seed-replicates", storage=study._storage)
    again.add_trial(
        create_trial(state=TrialState.RUNNING, user_attrs={"worker": {"host": "another"}, "replicate_of": 0, "seed": 1})
    )
    again.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"redundant": True}))
    history = read(tmp_path / "run")
    assert [trial.outcome for trial in history.seed_replicates] == ["running"]
    assert history.is_running
    assert datetime.now() - history.read_at < timedelta(minutes=5)


def test_the_made_up_journal_is_one_of_optuna(tmp_path: Path) -> None:
    make_study(tmp_path / "run", 30)
    trials = optuna.load_study(study_name="run", storage=journal_of(tmp_path / "run")).trials
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert all(json.dumps(trial.user_attrs) for trial in trials)
