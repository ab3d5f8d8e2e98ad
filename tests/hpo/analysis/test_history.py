from __future__ import annotations

import json
import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from lightning_bge.errors import StudyError
from lightning_bge.hpo.analysis.history import History, PastTrial, read_history, time_left
from lightning_bge.hpo.analysis.hours import SearchClock, best_over_hours, hours_saved
from lightning_bge.hpo.analysis.importance import parameter_importance
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Report, Steps
from lightning_bge.hpo.study import open_study, run_study
from tests.helpers.made_study import START, make_study, new_study
from tests.helpers.small_search import SPACE, make, write_files

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real search of six points with pauses."""
    folder = write_files(tmp_path_factory.mktemp("search"))
    config = StudyConfig(6, SPACE, pruner=PrunerConfig("promote", 2, 1), sampler="random")
    settings = {"monitor.metric": "loss", "monitor.objective": "best", "data.split.folds": 2, "trainer.max_epochs": 2}
    study = open_study(folder / "run", config, "minimize", Steps(2, 2), settings)
    (folder / "run" / "config.yaml").write_text("hpo: {n_trials: 6, pruner: {name: promote}}")
    objective = make(folder, paused_dir=folder / "run" / "paused", n_trials=6)
    run_study(study, objective, config, "loss", 4, folder / "run" / "paused")
    return folder / "run"


def read(run_dir: Path) -> History:
    history = read_history(run_dir)
    assert history is not None
    return history


def test_a_real_search_is_read_as_optuna_has_it(searched: Path) -> None:
    study = optuna.load_study(study_name="run", storage=open_study_storage(searched))
    history = read(searched)
    assert (history.name, history.direction, history.metric) == ("run", "minimize", "loss")
    assert (history.steps, history.planned, history.pruner) == (Steps(2, 2), 6, "promote")
    assert history.best is not None
    assert history.best.number == study.best_trial.number
    assert history.begun == 6
    assert not history.going_on
    for mine, its in zip(history.trials, study.trials, strict=True):
        assert (mine.number, mine.params, mine.reports) == (its.number, its.params, its.intermediate_values)
        assert (mine.start, mine.end) == (its.datetime_start, its.datetime_complete)
        assert mine.value == (its.value if its.state == TrialState.COMPLETE else None)
        assert mine.outcome in {TrialState.COMPLETE: ["complete"], TrialState.PRUNED: ["paused", "went on"]}[its.state]
        assert [[list(one) for one in fold] for fold in mine.curve] == its.user_attrs["curve"]
    resumed = [trial for trial in history.trials if trial.continues is not None]
    assert resumed
    for trial in resumed:
        assert history.trials[trial.continues].outcome == "went on"


def open_study_storage(run_dir: Path) -> optuna.storages.JournalStorage:
    from optuna.storages.journal import JournalFileBackend

    return optuna.storages.JournalStorage(JournalFileBackend(str(run_dir / "journal.log")))


def test_nothing_is_written_and_a_torn_line_is_left_out(searched: Path) -> None:
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
            read_history(searched)
    finally:
        journal.write_bytes(whole)


def test_a_study_that_is_being_made_has_no_history_yet(tmp_path: Path) -> None:
    assert read_history(tmp_path) is None
    (tmp_path / "journal.log").write_text("")
    assert read_history(tmp_path) is None
    (tmp_path / "journal.log").unlink()
    study = optuna.create_study(study_name=tmp_path.name, storage=open_study_storage(tmp_path))
    assert read_history(tmp_path) is None
    study.set_user_attr("space", {})
    study.set_user_attr("settings", {})
    with pytest.raises(StudyError, match="does not say its metric"):
        read_history(tmp_path)


def test_a_folder_that_was_renamed_is_read(tmp_path: Path) -> None:
    make_study(tmp_path / "before", 5)
    (tmp_path / "before").rename(tmp_path / "after")
    assert read(tmp_path / "after").name == "before"


def test_a_study_of_before_does_not_say_its_steps(tmp_path: Path) -> None:
    new_study(tmp_path / "run", 5, **{"hpo.val_check_interval": 0.5})
    assert read(tmp_path / "run").steps == Steps(5, 3, 2)


@pytest.mark.parametrize(
    ("state", "attributes", "outcome", "note"),
    [
        (TrialState.PRUNED, {"pruned_at": 1}, "pruned", ""),
        (TrialState.PRUNED, {"pruned_at": 1, "paused_at": 1}, "paused", ""),
        (TrialState.PRUNED, {"pruned_at": 1, "nan": "nan"}, "diverged", "nan"),
        (TrialState.PRUNED, {"oom_where": "training", "oom_requested": 5}, "out of memory", ""),
        (TrialState.FAIL, {}, "failed", ""),
        (TrialState.FAIL, {"swept": "process 7 is gone"}, "interrupted", "process 7 is gone"),
        (TrialState.WAITING, {}, "waiting", ""),
        (TrialState.RUNNING, {"worker": {"host": "another"}}, "running", ""),
        (TrialState.RUNNING, {}, "interrupted", "no worker recorded"),
    ],
)
def test_how_a_trial_stands(
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
    assert found.oom == ({"where": "training", "asked": 5} if outcome == "out of memory" else {})
    assert bool(note) == bool(found.note)


# ---------------------------------------------------------------------- what follows


def past(number: int, outcome: Any = "complete", start: float = 0.0, end: float = 1.0, **more: Any) -> PastTrial:
    times = {"start": START + timedelta(hours=start), "end": START + timedelta(hours=end)}
    return PastTrial(number, outcome, **{**times, **more})


def history_of(*trials: PastTrial, direction: Any = "maximize", **more: Any) -> History:
    known: dict[str, Any] = {"name": "s", "direction": direction, "metric": "f1", "objective": "best", "cost": None}
    known |= {"steps": Steps(2, 3), "planned": 9, "pruner": "promote", "space": {}, "seed_replicates": ()}
    return History(**{**known, "trials": trials, "read": START + timedelta(hours=24), **more})


def test_hours_count_once_where_trials_run_side_by_side_and_not_between_them() -> None:
    running = past(3, "running", 22, end=0)
    running = PastTrial(3, "running", running.start)
    died = PastTrial(4, "interrupted", START + timedelta(hours=5))
    clock = SearchClock(
        history_of(past(0, start=0, end=2), past(1, start=1, end=3), past(2, start=10, end=11), running, died)
    )
    assert clock.hours() == pytest.approx(3 + 1 + 2)
    for hour, hours in ((-1, 0), (0, 0), (1.5, 1.5), (3, 3), (7, 3), (10.5, 3.5), (23, 5), (30, 6)):
        assert clock.hours(START + timedelta(hours=hour)) == pytest.approx(hours)
    assert SearchClock(history_of()).hours() == 0


@pytest.mark.parametrize(("direction", "numbers"), [("maximize", [0, 2]), ("minimize", [0, 1])])
def test_the_best_so_far(direction: str, numbers: list[int]) -> None:
    values = [0.5, 0.4, 0.6, 0.6]
    trials = [past(n, start=n, end=n + 1, value=value) for n, value in enumerate(values)]
    found = best_over_hours(history_of(*trials, past(4, "paused", 4, 5), direction=direction))
    assert [trial.number for _, trial in found] == numbers
    assert [hours for hours, _ in found] == [number + 1 for number in numbers]


def test_of_equal_scores_the_cheaper_trial_is_the_better() -> None:
    history = history_of(past(0, value=0.5, cost=3.0), past(1, value=0.5, cost=2.0), past(2, value=0.4, cost=1.0))
    assert [trial.number for trial in history.ranked] == [1, 0, 2]


def curve(seconds: float, *steps: int) -> tuple[tuple[Report, ...], ...]:
    return (tuple(Report(step, 0.5, 0.75 * seconds, 0.25 * seconds, 0.0, 0.0) for step in steps),)


def test_hours_saved_are_the_missing_reports_at_each_trials_own_pace() -> None:
    one = past(0, "paused", reports={1: 0.1, 2: 0.2}, curve=curve(3600, 1, 2))  # 4 of 6 are missing, an hour each
    two = past(1, "pruned", reports={3: 0.1}, curve=curve(1800, 1, 2, 3))  # 3 of 6, half an hour each
    on = past(2, "went on", reports={1: 0.1}, curve=curve(3600, 1))
    unknown = past(3, "paused", reports={1: 0.1})
    oom = past(4, "out of memory", reports={1: 0.1}, curve=curve(3600, 1))
    found = hours_saved(history_of(one, two, on, unknown, oom, past(5, value=0.1), PastTrial(6, "running", START)))
    assert found.saved == pytest.approx(4 * 1 + 3 * 0.5)
    assert (found.spent, found.trials, found.unknown) == (pytest.approx(6), 2, 1)
    # two reports of one validation, where an epoch has fewer batches than parts
    skipped = past(0, "paused", reports={1: 0.1, 2: 0.1}, curve=curve(3600, 2))
    assert hours_saved(history_of(skipped)).saved == pytest.approx(4 * 0.5)


def test_importance_finds_the_setting_that_matters_and_says_where_it_can_not(tmp_path: Path) -> None:
    history = read(make_study(tmp_path / "run", 700))
    assert len(history.ranked) >= 20
    shares, note = parameter_importance(history)
    assert next(iter(shares)) == "model.optimizer.lr"
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert "Left out, as not all of them drew it: model.loss.focal_gamma" in note
    assert parameter_importance(history) == (shares, note)  # a fixed seed
    few = History(**{**vars(history), "trials": tuple(history.ranked[:9])})
    assert parameter_importance(few) == ({}, "Needs 10 trials that ran to their end; there are 9 so far.")
    flat = tuple(PastTrial(**{**vars(trial), "value": 0.5}) for trial in history.ranked)
    assert "have the same score" in parameter_importance(History(**{**vars(history), "trials": flat}))[1]


def test_the_time_left_is_known_when_something_runs_and_something_has_ended(tmp_path: Path) -> None:
    eta = time_left(make_study(tmp_path / "running", 40, running=True))
    assert eta is not None
    assert 0 < eta.low <= eta.mid <= eta.high
    assert time_left(make_study(tmp_path / "ended", 10)) is None
    assert time_left(tmp_path) is None
    config = tmp_path / "running" / "config.yaml"
    config.write_text("hpo: {}")
    assert time_left(tmp_path / "running") is None
    study = new_study(tmp_path / "first", 5)
    study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={"worker": {"host": "another"}}))
    assert time_left(tmp_path / "first") is None


def test_a_repeat_that_runs_keeps_a_study_going(tmp_path: Path) -> None:
    study = new_study(tmp_path / "run", 5)
    again = optuna.create_study(study_name="run-seed-replicates", storage=study._storage)
    again.add_trial(
        create_trial(state=TrialState.RUNNING, user_attrs={"worker": {"host": "another"}, "replicate_of": 0, "seed": 1})
    )
    again.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"redundant": True}))
    history = read(tmp_path / "run")
    assert [trial.outcome for trial in history.seed_replicates] == ["running"]
    assert history.going_on
    assert datetime.now() - history.read < timedelta(minutes=5)


def test_the_made_up_journal_is_one_of_optuna(tmp_path: Path) -> None:
    make_study(tmp_path / "run", 30)
    trials = optuna.load_study(study_name="run", storage=open_study_storage(tmp_path / "run")).trials
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert all(json.dumps(trial.user_attrs) for trial in trials)
