"""Runs in a tracker while trials run, and what becomes of them where the tracker is away or a process was killed."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from lightning_bge.hpo.trackers import tracking as module
from lightning_bge.hpo.trackers.config import TrackerConfig
from lightning_bge.hpo.trackers.tracking import Tracking, open_trackers
from tests.helpers.memory_tracker import STUDY, MemoryTracker


def refuse() -> None:
    """As a server that is away."""
    raise ConnectionError("nobody listens")


def trained(tracking: Tracking, study: optuna.Study, steps: int = 3, value: float | None = 0.5) -> None:
    """A trial with its reports; it fails where the value is None."""
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    tracking.begin(trial)
    for step in range(1, steps + 1):
        trial.report(step / 8, step)
        tracking.report(trial, [])
    tracking.flush()
    state = TrialState.FAIL if value is None else TrialState.COMPLETE
    tracking.reporting(lambda study, trial: None)(study, study.tell(trial, value, state=state))


def curves(tracker: MemoryTracker) -> list[dict[int, float]]:
    """The scores of each run."""
    return [run.logger.points.get("f1", {}) for run in tracker.runs.values()]


def states(tracker: MemoryTracker) -> list[str | None]:
    """The state of each run."""
    return [run.state for run in tracker.runs.values()]


def test_curves_appear_while_the_trial_runs() -> None:
    tracker, study = MemoryTracker(), optuna.create_study(direction="maximize")
    tracking = Tracking([tracker], STUDY)
    trial = study.ask()
    tracking.begin(trial)
    trial.report(0.25, 1)
    tracking.report(trial, [])
    tracking.flush()
    assert (curves(tracker), states(tracker)) == ([{1: 0.25}], [None])
    tracking.end(study, study.tell(trial, 0.5))
    tracking.flush()
    assert (curves(tracker), states(tracker)) == ([{1: 0.25}], ["complete"])


def test_a_tracker_that_is_away_fails_no_trial_and_is_made_up_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "lightning_bge")
    tracker, study = MemoryTracker(refuse), optuna.create_study(direction="maximize")
    tracking = Tracking([tracker], STUDY)
    for value in (0.5, None, 0.25):
        trained(tracking, study, value=value)
    tracking.flush()
    assert tracker.runs == {}
    [warning] = caplog.messages
    assert "memory can't be written to (ConnectionError: nobody listens). The study goes on" in warning
    tracker.away = lambda: None
    tracking.complete([study])
    assert states(tracker) == ["complete", "failed", "complete"]
    assert curves(tracker) == [trial.intermediate_values for trial in study.trials]
    tracking.complete([study])
    assert tracker.begun == 3


def test_a_tracker_that_is_away_for_some_trials_has_the_others(caplog: pytest.LogCaptureFixture) -> None:
    tracker, study = MemoryTracker(), optuna.create_study(direction="maximize")
    tracking = Tracking([tracker], STUDY)
    trained(tracking, study)
    tracker.away = refuse
    trained(tracking, study)
    tracker.away = lambda: None
    trained(tracking, study)
    tracking.flush()
    assert (len(caplog.messages), states(tracker)) == (1, ["complete"] * 2)
    tracking.complete([study])
    assert states(tracker) == ["complete"] * 3


def test_one_that_is_still_away_at_the_end_is_named_with_what_to_run(caplog: pytest.LogCaptureFixture) -> None:
    tracker, study = MemoryTracker(refuse), optuna.create_study(direction="maximize")
    tracking = Tracking([tracker], STUDY)
    trained(tracking, study)
    tracking.flush()
    caplog.clear()
    tracking.complete([study])
    tracking.end_study({})
    [warning] = caplog.messages
    assert "the runs in memory are not complete (ConnectionError: nobody listens)" in warning
    assert "Run the same `lightning-bge hpo` again" in warning


def test_one_that_does_not_answer_is_waited_for_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.01)
    answers, waits = threading.Event(), []
    tracker, study = MemoryTracker(answers.wait), optuna.create_study(direction="maximize")
    tracking = Tracking([tracker], STUDY)
    [writer] = tracking._writers
    monkeypatch.setattr(writer._idle, "wait", lambda seconds: waits.append(seconds))
    for _ in range(3):
        trained(tracking, study)
    tracking.complete([study])
    assert waits == [0.01]
    assert "the runs in memory are not complete (it does not answer)" in caplog.text
    answers.set()


def test_the_run_of_a_lost_trial_is_ended_by_who_begins_the_next_one() -> None:
    tracker, study = MemoryTracker(), optuna.create_study(direction="maximize")
    killed = Tracking([tracker], STUDY)
    trial = study.ask()
    killed.begin(trial)
    killed.flush()
    other = Tracking([tracker], STUDY)
    other.start([study])
    study._storage.set_trial_user_attr(trial._trial_id, "worker_lost", "process 1 is gone")
    study.tell(trial, state=TrialState.FAIL)
    other.begin(study.ask())
    other.flush()
    assert states(tracker) == ["killed", None]


def test_a_run_that_a_killed_process_has_not_created_is_created_at_the_end() -> None:
    tracker, study = MemoryTracker(), optuna.create_study(direction="maximize")
    trial = study.ask()
    trial.report(0.5, 1)
    study._storage.set_trial_user_attr(trial._trial_id, "worker_lost", "process 1 is gone")
    study.tell(trial, state=TrialState.FAIL)
    study.ask()  # and one that runs, which is left to its process
    tracking = Tracking([tracker], STUDY)
    tracking.complete([study])
    assert (states(tracker), curves(tracker)) == (["killed"], [{1: 0.5}])


def test_an_interrupted_trial_is_ended_when_the_process_ends() -> None:
    tracker, study = MemoryTracker(), optuna.create_study(direction="maximize")
    tracking = Tracking([tracker], STUDY)
    trial = study.ask()
    tracking.begin(trial)
    trial.set_user_attr("interrupted", "KeyboardInterrupt")
    study.tell(trial, state=TrialState.FAIL)
    tracking.close()
    assert states(tracker) == ["killed"]


def test_the_results_of_the_study_are_handed_on(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    Tracking([tracker], STUDY).end_study({"best_value": 0.5}, tmp_path / "report.html")
    assert tracker.results == [({"best_value": 0.5}, tmp_path / "report.html")]


def test_wandb_that_is_disabled_is_no_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert open_trackers([TrackerConfig("wandb")], STUDY)._writers == []


def test_without_trackers_nothing_is_read_or_started() -> None:
    tracking = Tracking()
    trial = optuna.create_study().ask()
    tracking.begin(trial)
    tracking.report(trial, [])
    tracking.flush()
    tracking.close()
    assert not [thread for thread in threading.enumerate() if thread.name in ("mlflow", "wandb", "tensorboard")]
