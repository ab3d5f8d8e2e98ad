"""Trials whose worker died: ended once, with their parameters queued once more."""

import logging
import os
import signal
from datetime import datetime, timedelta

import optuna
import pytest
from optuna.trial import TrialState

from lightning_bge.hpo.storage import workers
from lightning_bge.hpo.storage.journal import open_storage
from lightning_bge.hpo.storage.workers import _fail, abandon, sweep, this_worker
from tests.helpers.journal_processes import create, finish, pretend, start

optuna.logging.set_verbosity(optuna.logging.WARNING)

WORKER = """
import sys, time, optuna
from lightning_bge.hpo.storage.journal import open_storage
from lightning_bge.hpo.storage.workers import mark_alive
study = optuna.load_study(study_name="s", storage=open_storage(sys.argv[1]))
trial = study.ask()
mark_alive(trial)
trial.suggest_float("x", 0, 1)
trial.report(0.5, 1)
print("ready", flush=True)
time.sleep(600)
"""

SWEEPER = """
import sys, optuna
from lightning_bge.hpo.storage.workers import sweep
from lightning_bge.hpo.storage.journal import open_storage
study = optuna.load_study(study_name="s", storage=open_storage(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print(len(sweep(study)), flush=True)
"""


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "runs" / "study.log"


def test_the_trial_of_a_killed_worker_is_ended_and_its_parameters_are_tried_once_more(journal):
    study = create(journal)
    worker = start(WORKER, journal)
    assert sweep(study) == []  # alive
    worker.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # a zombie now: not reaped yet, and dead all the same
    (swept,) = sweep(study)
    finish(worker)
    assert (swept.number, swept.state) == (0, TrialState.FAIL)
    assert swept.user_attrs["swept"] == f"process {worker.pid} is gone"
    assert sweep(study) == []
    retry = study.ask()
    assert retry.suggest_float("x", 0, 1) == swept.params["x"]
    assert retry.user_attrs == {"retry_of": 0, "retries": 1}


def test_two_sweeps_at_once_end_and_queue_each_trial_once(journal):
    study = create(journal)
    numbers = [pretend(study, start="0") for _ in range(5)]
    sweepers = [start(SWEEPER, journal) for _ in range(2)]
    for sweeper in sweepers:
        sweeper.stdin.write("go\n")
        sweeper.stdin.flush()
    counts = [int(sweeper.stdout.readline()) for sweeper in sweepers]
    for sweeper in sweepers:
        finish(sweeper)
        assert sweeper.returncode == 0
    assert sum(counts) == 5
    waiting = study.get_trials(states=(TrialState.WAITING,))
    assert sorted(t.user_attrs["retry_of"] for t in waiting) == numbers


def test_the_slower_of_two_sweeps_ends_nothing(journal, monkeypatch):
    study = create(journal)
    pretend(study, start="0")
    seen = study.get_trials(deepcopy=True)
    other = optuna.load_study(study_name="s", storage=open_storage(journal))
    assert len(sweep(other)) == 1
    assert not _fail(study, seen[0], "late")
    assert study.trials[0].user_attrs["swept"] != "late"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"start": "0"}, "is another one now"),
        ({"pid": 2**22 + 1}, "is gone"),
        ({"boot": "before"}, "was restarted"),
        ({"boot": "before", "namespace": "old"}, "was restarted"),
        ({"host": "elsewhere"}, None),
        ({"host": "elsewhere", "boot": "other", "pid": 2**22 + 1}, None),
        ({"namespace": "pid:[1]", "pid": 2**22 + 1}, None),
        ({}, None),
    ],
)
def test_who_is_dead(journal, changes, reason, caplog):
    study = create(journal)
    number = pretend(study, **changes)
    with caplog.at_level(logging.WARNING):
        swept = sweep(study)
    assert [t.number for t in swept] == ([number] if reason else [])
    if reason:
        assert reason in swept[0].user_attrs["swept"]
    elif changes:
        assert "cannot be checked from here" in caplog.text
    else:
        assert not caplog.records


def test_a_trial_without_a_record_is_given_a_minute(journal, monkeypatch):
    study = create(journal)
    study.ask()
    assert sweep(study) == []

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(seconds=workers.RECORD_GRACE_SECONDS + 1)

    monkeypatch.setattr(workers, "datetime", Later)
    (swept,) = sweep(study)
    assert swept.user_attrs["swept"].startswith("no worker recorded")
    assert study.get_trials(states=(TrialState.WAITING,)) == []  # it had no parameters yet


def test_a_queued_parameter_set_survives_a_death_before_its_first_suggestion(journal):
    study = create(journal)
    study.enqueue_trial({"x": 0.25})
    trial = study.ask()
    trial.set_user_attr("worker", {**this_worker(), "start": "0"})
    sweep(study)
    assert study.ask().suggest_float("x", 0, 1) == 0.25


def test_parameters_that_keep_killing_their_worker_are_given_up(journal, caplog):
    study = create(journal)
    for _ in range(4):
        pretend(study, start="0")
        assert len(sweep(study, max_retries=2)) == 1
        if not study.get_trials(states=(TrialState.WAITING,)):
            break
    assert [t.user_attrs.get("retries", 0) for t in study.trials] == [0, 1, 2]
    assert "not tried once more" in caplog.text


def test_the_parameters_of_an_abandoned_trial_are_queued_once(journal):
    study = create(journal)
    number = pretend(study)
    abandon(study, number, "interrupted")
    abandon(study, number, "interrupted again")
    assert (study.trials[0].state, study.trials[0].user_attrs["swept"]) == (TrialState.FAIL, "interrupted")
    assert [t.user_attrs["retry_of"] for t in study.get_trials(states=(TrialState.WAITING,))] == [number]
