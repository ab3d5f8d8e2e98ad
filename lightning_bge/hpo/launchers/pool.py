"""Several workers of one study: replaced when they die, and stopped together."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import optuna
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.errors import StudyError
from lightning_bge.hpo.analysis.journal import has_study
from lightning_bge.hpo.config import SEED_REPLICATES
from lightning_bge.hpo.launchers.launcher import Launcher, RunningWorker, last_error
from lightning_bge.hpo.progress import Progress
from lightning_bge.hpo.ranking import score_of
from lightning_bge.hpo.storage.study_storage import StudyStorage
from lightning_bge.runtime.compat.optuna import storage_of
from lightning_bge.runtime.stop import StopRequest

POLL_SECONDS = 0.5
GRACE_SECONDS = 60.0  # between the request to stop and the end of the processes that do not follow it
IDLE_SECONDS = 30.0  # for which all workers that are left have to wait for a machine, once one has ended well
DEATHS = 5  # of each worker on average, in a row with no trial begun or ended: then something is wrong with all


@dataclass
class WorkerPool:
    """Runs a study with several workers, until nothing is left to do. A worker that dies is replaced.

    Args:
        study: the study, which is only read here.
        place: where it is kept.
        progress: prints a line for each trial, whichever worker ran it.
        launcher: starts the workers.
        timeout: seconds after which no trial is begun; None: there is no limit.
    """

    study: optuna.Study
    place: StudyStorage
    progress: Progress
    launcher: Launcher
    timeout: float | None
    deaths: int = 0
    idle_since: float | None = None
    seen: dict[str, set[int]] = field(default_factory=dict)
    known: int = -1

    def run(self) -> None:
        """Start the workers, and wait for them.

        Raises:
            StudyError: a worker ended with an error, or they die one after another.
            KeyboardInterrupt: Ctrl-C; the workers have saved what they trained.
            SystemExit: the same after SIGTERM or SIGHUP.
        """
        until = None if self.timeout is None else time.time() + self.timeout
        self.seen = {study.study_name: {one.number for one in ended(study)} for study in self._studies()}
        print(self.launcher.describe(self.place.run_dir), flush=True)
        running: dict[int, RunningWorker] = {}
        with StopRequest() as request:
            self.place.stop_when(lambda: request.signal)
            try:
                for number in range(self.launcher.n_workers):
                    running[number] = self.launcher.start(self.place.run_dir, number, until)
                while running and not request.signal and not self._is_idle(running):
                    time.sleep(POLL_SECONDS)
                    self._show()
                    for number in list(running):
                        self._look_after(running, number, until)
            finally:
                _stop(list(running.values()))
                self._show()
        request.leave()

    def _look_after(self, running: dict[int, RunningWorker], number: int, until: float | None) -> None:
        one = running[number]
        status = one.poll()
        if status is None:
            return
        del running[number]
        one.kill()
        if status == 0:
            self.idle_since = time.monotonic()
            return
        output = one.output()
        if status == 2:  # an error that the user can fix
            raise StudyError(last_error(output))
        self.deaths += 1
        if self.deaths > DEATHS * self.launcher.n_workers:
            raise StudyError(f"the workers die one after another; the last lines of {one.where}:\n{output}")
        print(f"a worker has ended with status {status} and is replaced; see {one.where}", flush=True)
        running[number] = self.launcher.start(self.place.run_dir, number, until)

    def _is_idle(self, running: dict[int, RunningWorker]) -> bool:
        """Whether nothing is left to do, although some workers have not ended: they have not begun either."""
        if self.idle_since is not None and not all([one.waits() for one in running.values()]):
            self.idle_since = time.monotonic()
        return self.idle_since is not None and time.monotonic() - self.idle_since > IDLE_SECONDS

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


def _stop(running: list[RunningWorker]) -> None:
    """Ask the workers to end, wait until they have saved what they train, and kill those that do not end."""
    for one in running:
        one.terminate()
    until = time.monotonic() + GRACE_SECONDS
    try:
        while any(one.poll() is None for one in running) and time.monotonic() < until:
            time.sleep(POLL_SECONDS / 10)
    except KeyboardInterrupt:  # once more: at once
        pass
    finally:
        for one in running:
            one.kill()


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that have ended."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]


def _show_replicate(trial: FrozenTrial) -> None:
    known, score = trial.user_attrs, score_of(trial)
    shown = f"done: {score:.4f}" if trial.state == TrialState.COMPLETE else trial.state.name.lower()
    print(f"trial {known.get('replicate_of')} with seed {known.get('seed')} {shown}", flush=True)
