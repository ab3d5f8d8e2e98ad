"""The record of a trial's process, on Linux and without `/proc`."""

import os
import subprocess
import sys

from lightning_bge.hpo.storage import workers
from lightning_bge.hpo.storage.workers import _start_time, boot_id, mark_alive, sweep, this_worker
from tests.helpers.journal_processes import create


def test_without_proc(monkeypatch):
    """What macOS has: the start time from ps, no boot id, no namespace."""
    real = workers.Path
    monkeypatch.setattr(workers, "Path", lambda p: real(str(p).replace("/proc/", "/no-proc/")))
    boot_id.cache_clear()
    try:
        here = this_worker()
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        assert _start_time(child.pid) is not None
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert _start_time(child.pid) is None  # a zombie
        child.stdin.close()
        child.wait()
        assert _start_time(child.pid) is None
    finally:
        boot_id.cache_clear()
    assert (here["boot"], here["namespace"]) == (None, None)
    assert here["start"]


def test_mark_alive_records_this_process(tmp_path):
    study = create(tmp_path / "study.log")
    trial = study.ask()
    mark_alive(trial)
    worker = study.trials[0].user_attrs["worker"]
    assert worker["pid"] == os.getpid()
    assert worker["start"] == _start_time(os.getpid())
    assert sweep(study) == []
