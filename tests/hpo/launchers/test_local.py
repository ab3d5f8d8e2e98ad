"""Workers on this machine."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.launchers.launcher import last_error, worker_arguments
from lightning_bge.hpo.launchers.local import LocalLauncher, Slot, WorkerProcess, slots


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None = None) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def test_one_worker_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    assert slots(StudyConfig()) == [Slot("0", 1, None), Slot("1", 1, None)]
    assert [slot.device for slot in slots(StudyConfig(workers_per_device=2))] == ["0", "1", "0", "1"]
    assert {slot.share for slot in slots(StudyConfig(workers_per_device=2))} == {2}
    assert slots(StudyConfig(workers=3))[2] == Slot("0", 2, None)


def test_gpus_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2, "GPU-a5,3")
    assert [slot.device for slot in slots(StudyConfig())] == ["GPU-a5", "3"]


def test_workers_on_a_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert slots(StudyConfig()) == [Slot(None, 1, 8)]
    assert slots(StudyConfig(workers=3)) == [Slot(None, 3, 2)] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert slots(StudyConfig(workers=3)) == [Slot(None, 3, None)] * 3


def test_the_arguments_of_a_worker(tmp_path: Path) -> None:
    assert worker_arguments(tmp_path, 2, 77, None, 0) == ["worker", str(tmp_path), "--share", "2", "--parent", "77"]
    assert worker_arguments(tmp_path, 1, 7, 12.5, 10)[-2:] == ["--timeout", "2.500"]
    assert worker_arguments(tmp_path, 1, 7, 9, 10)[-2:] == ["--timeout", "0.001"]  # its time is over


def end(process: WorkerProcess) -> int:
    while (status := process.poll()) is None:
        time.sleep(0.01)
    return status


def test_a_worker_that_can_not_start_says_why(tmp_path: Path) -> None:
    worker = LocalLauncher([Slot(None, 1, 1)]).start(tmp_path, 0, None)
    assert end(worker) == 2
    assert last_error(worker.output()).startswith(f"{tmp_path}: expected the run folder of a study")
    assert worker.where == str(tmp_path / "workers" / "worker-0.log")
    assert (tmp_path / "workers" / "worker-0.log").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_a_worker_is_ended(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeping = tmp_path / "sleeping"
    sleeping.write_text("#!/bin/sh\necho $MARK\nexec sleep 60\n")
    sleeping.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(sleeping))
    worker = WorkerProcess([], tmp_path / "log", {"MARK": "begun"})
    while worker.output() != "begun":
        time.sleep(0.01)
    assert worker.poll() is None
    getattr(worker, how)()
    assert end(worker) == -(signal.SIGTERM if how == "terminate" else signal.SIGKILL)
    worker.kill()  # does nothing more
    worker.terminate()
