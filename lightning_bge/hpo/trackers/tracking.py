"""The runs of a study's trials in all trackers: written while trials run, and brought up to date at the study's end.

A tracker is written to by a thread of its own, so that one that is slow or away never stops a trial. What it has
missed, and what a killed process has left, is written at the end of the study: it all follows from the trials.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from lightning_bge.hpo.steps import Report
from lightning_bge.hpo.trackers.config import TrackerConfig, short_reason, wandb_mode
from lightning_bge.hpo.trackers.record import StudyRecord, TrialRecord, has_run, record_of
from lightning_bge.hpo.trackers.tracker import Tracker, TrialRun
from lightning_bge.hpo.trials import WORKER_LOST

log = logging.getLogger("lightning_bge")

FLUSH_SECONDS = 10.0  # for which a tracker that answers slowly is waited for, once, at the end of a trial
REMEDY = "Run the same `lightning-bge hpo` again when it answers: that brings its runs up to date, and trains nothing"


class Tracking:
    """The runs of a study in all its trackers.

    Args:
        trackers: none of them: nothing is written.
        study: the study; None only without trackers.
    """

    def __init__(self, trackers: Sequence[Tracker] = (), study: StudyRecord | None = None) -> None:
        self.study = study
        self._writers = [_Writer(tracker) for tracker in trackers]
        self._seen: dict[str, set[int]] = {}  # of each study the lost trials that were looked at
        self._open: tuple[optuna.Study, int] | None = None  # the trial whose run this process has not ended

    def start(self, studies: Sequence[optuna.Study]) -> None:
        """Leave the trials that are lost by now to `complete`."""
        self._seen = {study.study_name: {trial.number for trial in _lost(study)} for study in studies}

    def begin(self, trial: optuna.Trial) -> None:
        """A trial begins; what has become of others whose process is gone is written too."""
        if self._writers:
            self._open = trial.study, trial.number
            self._each(_Writer.begin, self._record(trial.study.get_trials(deepcopy=False)[trial.number]))
            seen = self._seen.setdefault(trial.study.study_name, set())
            for lost in _lost(trial.study):
                if lost.number not in seen:
                    seen.add(lost.number)
                    self._each(_Writer.end_lost, self._record(lost))

    def report(self, trial: optuna.Trial, curve: Sequence[Sequence[Report]]) -> None:
        """A trial has reported, and has these validations so far."""
        if self._writers:
            frozen = trial.study.get_trials(deepcopy=False)[trial.number]
            self._each(_Writer.log, self._record(frozen, curve))

    def flush(self) -> None:
        """Wait until all is written, but not for a tracker that does not answer."""
        for writer in self._writers:
            writer.flush()

    def end(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """A trial of this process has ended."""
        self._open = None
        if self._writers and has_run(trial) and trial.state.is_finished():
            self._each(_Writer.end, self._record(trial))

    def reporting(self, report: Callable[[optuna.Study, FrozenTrial], None]) -> Callable[..., None]:
        """A function that is called after each trial, and `end` before it."""

        def both(study: optuna.Study, trial: FrozenTrial) -> None:
            self.end(study, trial)
            report(study, trial)

        return both

    def complete(self, studies: Sequence[optuna.Study]) -> None:
        """Bring the runs of all ended trials up to date. One process at a time.

        Args:
            studies: the study, and those of its seed replicates and its baseline.
        """
        if self._writers:
            trials = [trial for study in studies for trial in study.get_trials(deepcopy=False) if has_run(trial)]
            records = [self._record(trial) for trial in trials if trial.state.is_finished()]
            for writer in self._writers:
                writer.directly(lambda tracker: _complete(tracker, records))

    def end_study(self, summary: Mapping[str, Any], report: Path | None = None) -> None:
        """Write the results of the study into its own run, and `report.html`, where there is one."""
        for writer in self._writers:
            writer.directly(lambda tracker: tracker.end_study(summary, report))

    def close(self) -> None:
        """Write how the last trial has ended, where an error or Ctrl-C has left that out, and stop writing."""
        if self._open is not None:
            study, number = self._open
            self.end(study, study.get_trials(deepcopy=False)[number])
        self.flush()

    def _record(self, trial: FrozenTrial, curve: Sequence[Sequence[Report]] = ()) -> TrialRecord:
        assert self.study is not None
        return record_of(self.study, trial, curve)

    def _each(self, write: Callable[[_Writer, TrialRecord], None], record: TrialRecord) -> None:
        for writer in self._writers:
            writer.submit(lambda writer=writer: write(writer, record))  # type: ignore[misc]


def open_trackers(configs: Sequence[TrackerConfig], study: StudyRecord) -> Tracking:
    """The trackers of a study; none is reached yet."""
    return Tracking([_tracker(config, study) for config in configs if not _is_disabled(config)], study)


def _is_disabled(config: TrackerConfig) -> bool:
    return config.name == "wandb" and wandb_mode(config.options) == "disabled"


def _tracker(config: TrackerConfig, study: StudyRecord) -> Tracker:
    # imported here: each needs a package of its own
    if config.name == "mlflow":
        from lightning_bge.hpo.trackers.mlflow import MLflowTracker

        return MLflowTracker(config.options, study)
    if config.name == "wandb":
        from lightning_bge.hpo.trackers.wandb import WandbTracker

        return WandbTracker(config.options, study)
    from lightning_bge.hpo.trackers.tensorboard import TensorBoardTracker

    return TensorBoardTracker(config.options, study)


def _lost(study: optuna.Study) -> list[FrozenTrial]:
    """The trials whose process was gone."""
    trials = study.get_trials(deepcopy=False)
    return [one for one in trials if WORKER_LOST in one.user_attrs and one.state.is_finished() and has_run(one)]


def _complete(tracker: Tracker, records: Sequence[TrialRecord]) -> None:
    known = tracker.known()
    for record in records:
        found = known.get(record.key)
        if found is None or not found.is_as(record):
            tracker.complete(record)


class _Writer:
    """Writes into one tracker, in a thread of its own.

    Args:
        tracker: the tracker.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._idle = threading.Event()  # cleared by a wait that has lasted too long
        self._idle.set()
        self._is_open = self._has_warned = self._is_away = False
        self._run: TrialRun | None = None  # of the trial that runs; None: it can't be written now

    # ------------------------------------------------------------------ in the thread

    def begin(self, record: TrialRecord) -> None:
        self._run = None
        self._open()
        self._run = self.tracker.begin(record)
        self._run.log(record)

    def log(self, record: TrialRecord) -> None:
        if self._run is not None and self._run.key == record.key:
            self._run.log(record)

    def end(self, record: TrialRecord) -> None:
        run, self._run = self._run, None
        if run is not None and run.key == record.key:
            run.end(record)

    def end_lost(self, record: TrialRecord) -> None:
        self._open()
        self.tracker.end_lost(record)

    def _open(self) -> None:
        if not self._is_open:
            self.tracker.open()
            self._is_open = True

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except Exception as error:  # of whatever kind a tracker's package has: no trial may fail by it
                self._run = None
                self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            text = "hpo.trackers: %s can't be written to (%s: %s). The study goes on; its end writes what is missing"
            log.warning(text, self.tracker.name, type(error).__name__, short_reason(error))

    # ------------------------------------------------------------------ in the thread of the study

    def submit(self, job: Callable[[], None]) -> None:
        """Have the thread do something."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self.tracker.name, daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def flush(self) -> bool:
        """Wait until the thread has nothing to do; False: it did not answer in time, now or earlier."""
        if self._thread is not None and self._idle.is_set():
            self._idle.clear()
            self._jobs.put(self._idle.set)
            self._idle.wait(FLUSH_SECONDS)
        return self._idle.is_set()

    def directly(self, work: Callable[[Tracker], None]) -> None:
        """Do something now, in this thread; say once where the tracker is away."""
        if self._is_away:  # it was said, and another try takes as long again
            return
        reason = "it does not answer"
        if self.flush():
            try:
                self._open()
                work(self.tracker)
                return
            except Exception as error:  # as in `_work`
                reason = f"{type(error).__name__}: {short_reason(error)}"
        self._is_away = True
        log.warning("hpo.trackers: the runs in %s are not complete (%s). %s", self.tracker.name, reason, REMEDY)
