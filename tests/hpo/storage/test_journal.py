"""The journal file: repaired where it is torn, and locked so that a killed process stalls nobody."""

import json
import logging
import os
import select
import signal
import stat
import subprocess
import sys
import time

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from lightning_bge.errors import StudyError
from lightning_bge.hpo.storage import journal as module
from lightning_bge.hpo.storage.journal import JournalLock, boot_id, open_storage
from tests.helpers.journal_processes import create, finish, start

optuna.logging.set_verbosity(optuna.logging.WARNING)


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
        repaired = optuna.load_study(study_name="s", storage=open_storage(journal))
    assert "torn last line" in caplog.text
    assert journal.read_bytes() == whole
    repaired.optimize(lambda trial: 2.0, n_trials=1)
    assert [t.value for t in repaired.trials] == [1.0, 1.0, 2.0]


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
from lightning_bge.hpo.storage.journal import JournalLock
lock = JournalLock(Path(sys.argv[1]))  # without a name it would be freed at once
lock.acquire()
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


def test_without_a_boot_id_every_lock_is_waited_for(journal, monkeypatch):
    """As on macOS and Windows."""
    create(journal)
    real = module.Path
    monkeypatch.setattr(module, "Path", lambda path: real(str(path).replace("/proc/", "/no-proc/")))
    boot_id.cache_clear()
    try:
        assert boot_id() is None
        lock = f"{journal}.lock"
        with open(lock, "w"):
            pass
        waited = []

        def release(seconds):
            waited.append(seconds)
            os.unlink(lock)

        monkeypatch.setattr(time, "sleep", release)
        assert open_storage(journal).get_all_studies()[0].study_name == "s"
        assert len(waited) == 1
    finally:
        boot_id.cache_clear()


def test_lock_excludes_and_must_be_held_to_be_released(journal):
    create(journal)
    lock = JournalLock(journal)
    with pytest.raises(RuntimeError, match="not held"):
        lock.release()
    holder = start(KILLED_HOLDER, journal)
    waiter = subprocess.Popen([sys.executable, "-c", KILLED_HOLDER, str(journal)], stdout=subprocess.PIPE, text=True)
    assert not select.select([waiter.stdout], [], [], 3.0)[0]  # it waits, and has printed nothing
    holder.kill()
    assert waiter.stdout.readline() == "ready\n"  # only once the holder is gone
    waiter.kill()
    waiter.stdout.close()
    waiter.wait()
    finish(holder)
