import json
import logging
import os
import signal
import stat
import subprocess
import sys
import time
from datetime import datetime, timedelta

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import TrialState

from lightning_bge.errors import StudyError
from lightning_bge.hpo import storage as module
from lightning_bge.hpo.storage import JournalLock, abandon, enqueue_once, mark_alive, open_storage, sweep

optuna.logging.set_verbosity(optuna.logging.WARNING)

# the file alone, without its package: the children need neither torch nor transformers, and start in tenths of a second
LOAD = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("storage", {module.__file__!r})
storage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(storage)
JournalLock, enqueue_once, mark_alive, open_storage, sweep = (
    storage.JournalLock, storage.enqueue_once, storage.mark_alive, storage.open_storage, storage.sweep
)
"""

WORKER = """
import sys, time, optuna
study = optuna.load_study(study_name="s", storage=open_storage(sys.argv[1]))
trial = study.ask()
mark_alive(trial)
trial.suggest_float("x", 0, 1)
trial.report(0.5, 1)
print("ready", flush=True)
time.sleep(600)
"""

SWEEPER = """
import sys, time, optuna
study = optuna.load_study(study_name="s", storage=open_storage(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print(len(sweep(study)), flush=True)
"""


ENQUEUER = """
import pathlib, sys, optuna
study = optuna.load_study(study_name="s", storage=open_storage(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print(enqueue_once(study, [{"x": number / 8} for number in range(8)], pathlib.Path(sys.argv[1])), flush=True)
"""


def start(code, path):
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD + code, str(path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def finish(process):
    process.stdout.close()
    process.stdin.close()
    process.wait()


def create(path):
    return optuna.create_study(study_name="s", storage=open_storage(path), direction="maximize")


def pretend(study, **changes):
    """Leave a RUNNING trial with a changed record of its worker, and return its number."""
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial.set_user_attr("worker", {**module._this_worker(), **changes})
    return trial.number


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "runs" / "study.log"


def test_new_journal_is_private_and_is_optunas_format(journal):
    study = create(journal)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    assert stat.S_IMODE(journal.stat().st_mode) == 0o600
    assert sorted(p.name for p in journal.parent.iterdir()) == ["study.log", "study.log.guard"]
    plain = optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(journal))))
    assert [t.params for t in plain.trials] == [t.params for t in study.trials]


@pytest.mark.parametrize("tail", [b'{"op_code":4,"wor', b'{"op_code":4,"wor\n', b"\0" * 50, b"\xff\xfe\n", b"7\n"])
def test_torn_last_line_is_cut_off(journal, tail, caplog):
    study = create(journal)
    study.optimize(lambda trial: 1.0, n_trials=2)
    whole = journal.read_bytes()
    journal.write_bytes(whole + tail)
    with caplog.at_level(logging.WARNING):
        mended = optuna.load_study(study_name="s", storage=open_storage(journal))
    assert "torn last line" in caplog.text
    assert journal.read_bytes() == whole
    mended.optimize(lambda trial: 2.0, n_trials=1)
    assert [t.value for t in mended.trials] == [1.0, 1.0, 2.0]


def test_trap_optuna_alone_never_recovers_from_a_torn_line(journal):
    create(journal)
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    plain = JournalStorage(JournalFileBackend(str(journal)))
    with pytest.raises(AttributeError):  # its own record went into the torn line
        optuna.load_study(study_name="s", storage=plain).ask()
    with pytest.raises(json.JSONDecodeError):
        optuna.load_study(study_name="s", storage=plain).ask()
    with pytest.raises(json.JSONDecodeError):
        JournalStorage(JournalFileBackend(str(journal))).get_all_studies()


def test_corrupt_middle_is_an_error_that_names_the_line(journal):
    create(journal).optimize(lambda trial: 1.0, n_trials=2)
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:10] + b"\n"
    journal.write_bytes(b"".join(lines))
    with pytest.raises(StudyError, match="line 3 is not a record"):
        open_storage(journal)
    assert journal.read_bytes() == b"".join(lines)
    assert not os.path.exists(f"{journal}.lock")


def test_torn_line_is_cut_off_by_the_next_writer(journal, caplog):
    study, other = create(journal), optuna.load_study(study_name="s", storage=open_storage(journal))
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    assert other.trials == []
    study.optimize(lambda trial: 1.0, n_trials=2)
    assert [t.value for t in other.trials] == [1.0, 1.0]
    assert "torn last line of 17 bytes" in caplog.text


def test_complete_journal_is_left_alone(journal, caplog):
    create(journal)
    before = journal.read_bytes()
    open_storage(journal)
    assert journal.read_bytes() == before
    assert not caplog.records


KILLED_HOLDER = """
import sys, time
from pathlib import Path
JournalLock(Path(sys.argv[1])).acquire()
print("ready", flush=True)
time.sleep(600)
"""


def test_lock_of_a_killed_holder_is_removed_at_once(journal, monkeypatch, caplog):
    study = create(journal)
    holder = start(KILLED_HOLDER, journal)
    assert os.path.exists(f"{journal}.lock")
    holder.send_signal(signal.SIGKILL)
    finish(holder)
    # Optuna sleeps while it waits for a lock file; ours must not come to that
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits for the dead"))
    with caplog.at_level(logging.WARNING):
        study.set_user_attr("a", 1)
    assert "its holder was killed" in caplog.text
    assert not os.path.exists(f"{journal}.lock")


@pytest.mark.parametrize("kind", ["plain optuna", "other host"])
def test_lock_of_others_is_waited_for(journal, kind, monkeypatch):
    create(journal)
    lock = f"{journal}.lock"
    if kind == "plain optuna":
        JournalFileSymlinkLock(str(journal)).acquire()
    else:
        with open(lock, "w") as file:
            file.write("another boot id")
    waited = []

    def release(seconds):
        waited.append(seconds)
        os.unlink(lock)

    monkeypatch.setattr(time, "sleep", release)
    open_storage(journal)
    assert len(waited) == 1


def test_lock_excludes_and_must_be_held_to_be_released(journal):
    create(journal)
    lock = JournalLock(journal)
    with pytest.raises(RuntimeError, match="not held"):
        lock.release()
    holder = start(KILLED_HOLDER, journal)
    waiter = subprocess.Popen(
        [sys.executable, "-c", LOAD + KILLED_HOLDER, str(journal)], stdout=subprocess.PIPE, text=True
    )
    time.sleep(0.2)
    assert waiter.poll() is None
    holder.kill()
    assert waiter.stdout.readline() == "ready\n"  # only once the holder is gone
    waiter.kill()
    waiter.stdout.close()
    waiter.wait()
    finish(holder)


def test_killed_worker_is_swept_and_its_point_comes_again(journal):
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
    assert not module._fail(study, seen[0], "late")
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
            return datetime.now(tz) + timedelta(seconds=module.RECORD_GRACE_SECONDS + 1)

    monkeypatch.setattr(module, "datetime", Later)
    (swept,) = sweep(study)
    assert swept.user_attrs["swept"].startswith("no worker recorded")
    assert study.get_trials(states=(TrialState.WAITING,)) == []  # it had no point yet


def test_a_queued_point_survives_a_death_before_its_first_suggestion(journal):
    study = create(journal)
    study.enqueue_trial({"x": 0.25})
    trial = study.ask()
    trial.set_user_attr("worker", {**module._this_worker(), "start": "0"})
    sweep(study)
    assert study.ask().suggest_float("x", 0, 1) == 0.25


def test_a_point_that_keeps_killing_its_worker_is_given_up(journal, caplog):
    study = create(journal)
    for _ in range(4):
        pretend(study, start="0")
        assert len(sweep(study, max_retries=2)) == 1
        if not study.get_trials(states=(TrialState.WAITING,)):
            break
    assert [t.user_attrs.get("retries", 0) for t in study.trials] == [0, 1, 2]
    assert "not tried again" in caplog.text


def test_an_abandoned_trial_comes_again_once(journal):
    study = create(journal)
    number = pretend(study)
    abandon(study, number, "interrupted")
    abandon(study, number, "interrupted again")
    assert (study.trials[0].state, study.trials[0].user_attrs["swept"]) == (TrialState.FAIL, "interrupted")
    assert [t.user_attrs["retry_of"] for t in study.get_trials(states=(TrialState.WAITING,))] == [number]


def test_without_proc(monkeypatch):
    """What macOS has: the start time from ps, no boot id, no namespace."""
    real = module.Path
    monkeypatch.setattr(module, "Path", lambda p: real(str(p).replace("/proc/", "/no-proc/")))
    module._boot_id.cache_clear()
    try:
        here = module._this_worker()
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        assert module._start_time(child.pid) is not None
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert module._start_time(child.pid) is None  # a zombie
        child.stdin.close()
        child.wait()
        assert module._start_time(child.pid) is None
    finally:
        module._boot_id.cache_clear()
    assert (here["boot"], here["namespace"]) == (None, None)
    assert here["start"]


def test_mark_alive_records_this_process(journal):
    study = create(journal)
    trial = study.ask()
    mark_alive(trial)
    worker = study.trials[0].user_attrs["worker"]
    assert worker["pid"] == os.getpid()
    assert worker["start"] == module._start_time(os.getpid())
    assert sweep(study) == []


def test_three_processes_queue_each_point_once(journal):
    study = create(journal)
    processes = [start(ENQUEUER, journal) for _ in range(3)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    counts = [int(process.stdout.readline()) for process in processes]
    for process in processes:
        finish(process)
        assert process.returncode == 0
    assert sorted(counts) == [0, 0, 8]
    assert [trial.user_attrs["enqueued"] for trial in study.trials] == [{"x": number / 8} for number in range(8)]


def test_points_are_queued_once_whatever_became_of_them(journal):
    study = create(journal)
    points = [{"x": 0.5}, {"x": 0.25, "y": "a"}]
    assert enqueue_once(study, points, journal) == 2
    trial = study.ask()
    assert trial.suggest_float("x", 0, 1) == 0.5
    trial.set_user_attr("worker", {**module._this_worker(), "start": "0"})
    assert len(sweep(study)) == 1
    assert enqueue_once(study, points, journal) == 0
    # a process that was killed in the middle of it has queued a part, and points may be added later
    assert enqueue_once(study, [{"x": 0.75}, *points], journal) == 1
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.FAIL, TrialState.WAITING, TrialState.WAITING, TrialState.WAITING]
    assert [trial.system_attrs["fixed_params"] for trial in study.trials[1:]] == [points[1], points[0], {"x": 0.75}]
