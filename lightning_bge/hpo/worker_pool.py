"""Several processes on one machine that run one study: started, replaced when they die, and stopped together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.errors import StudyError
from lightning_bge.hpo.analysis.journal import has_study
from lightning_bge.hpo.config import SEED_REPLICATES, StudyConfig
from lightning_bge.hpo.progress import Progress
from lightning_bge.hpo.ranking import score_of
from lightning_bge.hpo.storage.study_storage import StudyStorage
from lightning_bge.hpo.storage.workers import WORKERS
from lightning_bge.runtime.compat.optuna import storage_of
from lightning_bge.runtime.run_folder import create_run_dir
from lightning_bge.runtime.stop import StopRequest

POLL_SECONDS = 0.5
GRACE_SECONDS = 60.0  # between the request to stop and the end of the processes that do not follow it
DEATHS = 5  # of each worker on average, in a row with no trial begun or ended: then something is wrong with all


@dataclass(frozen=True)
class Slot:
    """What one worker of several has.

    Attributes:
        device: of CUDA, as CUDA_VISIBLE_DEVICES names it; None: the CPU.
        share: how many workers the device has.
        threads: of a CPU; None: as torch decides.
    """

    device: str | None
    share: int
    threads: int | None


def slots(config: StudyConfig) -> list[Slot]:
    """The workers of a study on this machine: `hpo.workers`, else `hpo.workers_per_device` for each GPU, else one."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    n_workers = config.workers or max(1, len(devices) * config.workers_per_device)
    if not devices:
        threads = None if "OMP_NUM_THREADS" in os.environ else max(1, len(os.sched_getaffinity(0)) // n_workers)
        return [Slot(None, n_workers, threads)] * n_workers
    share = -(-n_workers // len(devices))
    return [Slot(devices[number % len(devices)], share, None) for number in range(n_workers)]


@dataclass
class _Process:
    slot: Slot
    log: Path
    running: subprocess.Popen[bytes] | None = None


@dataclass
class WorkerPool:
    """Runs the study of a folder in several processes, until nothing is left to do.

    A process that dies is replaced. What each prints goes to `workers/worker-N.log` in the run folder.

    Args:
        study: the study, which is only read here.
        place: where it is kept.
        config: the options of the study.
        progress: prints a line for each trial, whichever process ran it.
        slots: what each process has.
    """

    study: optuna.Study
    place: StudyStorage
    config: StudyConfig
    progress: Progress
    slots: list[Slot]
    deaths: int = 0
    seen: dict[str, set[int]] = field(default_factory=dict)
    known: int = -1

    def run(self) -> None:
        """Start the processes, and wait for them.

        Raises:
            StudyError: a process ended with an error, or they die one after another.
            KeyboardInterrupt: Ctrl-C; the processes have saved what they trained.
            SystemExit: the same after SIGTERM or SIGHUP.
        """
        until = None if self.config.timeout is None else time.monotonic() + self.config.timeout
        folder = create_run_dir(self.place.run_dir / WORKERS)
        pool = [_Process(slot, folder / f"worker-{number}.log") for number, slot in enumerate(self.slots)]
        self.seen = {study.study_name: {one.number for one in ended(study)} for study in self._studies()}
        print(f"{len(pool)} workers; what each prints is in {folder}", flush=True)
        with StopRequest() as request:
            self.place.stop_when(lambda: request.signal)
            try:
                for one in pool:
                    self._start(one, until)
                while any(one.running for one in pool) and not request.signal:
                    time.sleep(POLL_SECONDS)
                    self._show()
                    for one in pool:
                        self._look_after(one, until)
            finally:
                self._stop(pool)
                self._show()
        request.leave()

    def _start(self, one: _Process, until: float | None) -> None:
        command = [sys.executable, "-m", "lightning_bge.cli", "worker", str(self.place.run_dir.resolve())]
        command += ["--share", str(one.slot.share), "--parent", str(os.getpid())]
        if until is not None:
            command += ["--timeout", f"{max(0.001, until - time.monotonic()):.3f}"]
        own = {} if one.slot.device is None else {"CUDA_VISIBLE_DEVICES": one.slot.device}
        own |= {} if one.slot.threads is None else {"OMP_NUM_THREADS": str(one.slot.threads)}
        with _open_log(one.log) as log:
            # a group of its own: Ctrl-C in the terminal is for this process, which passes it on
            one.running = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **own}, process_group=0
            )

    def _look_after(self, one: _Process, until: float | None) -> None:
        status = None if one.running is None else one.running.poll()
        if status is None:
            return
        one.running = None
        if status == 0:
            return
        if status == 2:  # an error that the user can fix
            raise StudyError(last_message(one.log))
        self.deaths += 1
        if self.deaths > DEATHS * len(self.slots):
            raise StudyError(f"the workers die one after another; the last lines of {one.log}:\n{tail(one.log)}")
        print(f"a worker has ended with status {status} and is replaced; see {one.log}", flush=True)
        self._start(one, until)

    def _show(self) -> None:
        """Print a line for each trial that has ended since the last look."""
        studies = self._studies()
        for study in studies:
            seen = self.seen.setdefault(study.study_name, set())
            for trial in ended(study):
                if trial.number not in seen:
                    seen.add(trial.number)
                    self.progress(study, trial) if study.study_name == self.study.study_name else _show_replicate(trial)
        known = sum(len(study.get_trials(deepcopy=False)) for study in studies) + sum(map(len, self.seen.values()))
        if known != self.known:
            self.known, self.deaths = known, 0

    def _studies(self) -> list[optuna.Study]:
        storage, name = storage_of(self.study), f"{self.study.study_name}{SEED_REPLICATES}"
        there = has_study(storage, name)
        return [self.study, *([optuna.load_study(study_name=name, storage=storage)] if there else [])]

    def _stop(self, pool: list[_Process]) -> None:
        running = [one.running for one in pool if one.running is not None]
        for process in running:
            process.terminate()
        until = time.monotonic() + GRACE_SECONDS
        for process in running:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                process.kill()
                process.wait()


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that have ended."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]


def _show_replicate(trial: FrozenTrial) -> None:
    known, score = trial.user_attrs, score_of(trial)
    shown = f"done: {score:.4f}" if trial.state == TrialState.COMPLETE else trial.state.name.lower()
    print(f"trial {known.get('replicate_of')} with seed {known.get('seed')} {shown}", flush=True)


def _open_log(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")


def tail(path: Path, lines: int = 10) -> str:
    """The last lines of a file."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def last_message(log: Path) -> str:
    """The last error that a worker printed."""
    _, mark, text = log.read_text(encoding="utf-8", errors="replace").rpartition("lightning-bge: ")
    return text.strip() if mark else tail(log)
