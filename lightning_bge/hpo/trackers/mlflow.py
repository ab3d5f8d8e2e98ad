"""Runs in MLflow: a run for the study, and those of its trials nested in it."""

from __future__ import annotations

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from lightning.pytorch.loggers import MLFlowLogger

from lightning_bge.hpo.trackers.config import local_folder
from lightning_bge.hpo.trackers.record import Points, StudyRecord, TrialRecord
from lightning_bge.hpo.trackers.tracker import Known, Tracker, TrialRun, results_of
from lightning_bge.runtime.run_folder import create_run_dir

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# MLflow has no state for pruned trials: the tag `state` tells them from complete ones
STATUS = {"complete": "FINISHED", "pruned": "FINISHED", "paused": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
# tags of the runs
STUDY, TRIAL, STATE, N_POINTS = "study_key", "trial_key", "state", "n_points"
PARENT = "mlflow.parentRunId"  # by which MLflow nests runs
TORN_SECONDS = 0.5  # for which a file may be empty because it is being written
PAGE = 1000  # runs of one answer
# 14 seconds, where MLflow's own 7 take four minutes: the end of the study makes up for what is missing
RETRIES = "3"


class MLflowRun(TrialRun):
    """The run of a trial."""

    logger: MLFlowLogger

    def end(self, record: TrialRecord) -> None:
        """The last points, the value, the tags, and the status."""
        from mlflow.entities import RunTag

        self.log(record)
        if record.values:
            self.logger.log_metrics(record.values, record.last_step)
        client, run_id = self.logger.experiment, self.logger.run_id
        assert record.state is not None
        assert run_id is not None
        tags = record.tags | {STATE: record.state, N_POINTS: str(record.n_points)}
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        client.set_terminated(run_id, STATUS[record.state], _milliseconds(record.end))


class MLflowTracker(Tracker):
    """The runs of a study in MLflow.

    Options: `tracking_uri` (else MLFLOW_TRACKING_URI, else MLflow's own default) and `experiment` (else
    MLFLOW_EXPERIMENT_NAME, else `lightning-bge`).
    """

    name = "mlflow"

    def __init__(self, options: Mapping[str, str], study: StudyRecord) -> None:
        super().__init__(options, study)
        self.experiment = options.get("experiment") or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "lightning-bge"
        self.client: MlflowClient
        self.uri = self.experiment_id = self.parent = ""

    def open(self) -> None:
        """Find or create the experiment, and the run of the study."""
        import mlflow

        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", RETRIES)
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # else two lines for each trial
        self.uri = self.options.get("tracking_uri") or mlflow.get_tracking_uri()
        # one process of this machine after the other: two would create the tables, the experiment and the run twice
        with FileLock(create_run_dir(self.study.run_dir) / "trackers.lock", mode=0o600):
            self.client = mlflow.MlflowClient(self.uri)
            found = self.client.get_experiment_by_name(self.experiment)
            self.experiment_id = (
                self.client.create_experiment(self.experiment) if found is None else found.experiment_id
            )
            if (folder := local_folder(self.uri)) is not None:
                _remove_torn(folder / self.experiment_id, self.study.key)
            runs = [run for run in self._runs() if TRIAL not in run.data.tags]
            self.parent = min(runs, key=_age).info.run_id if runs else self._create_parent()

    def _create_parent(self) -> str:
        tags = {STUDY: self.study.key, "kind": "study", "metric": self.study.metric}
        run = self.client.create_run(self.experiment_id, tags=tags, run_name=self.study.name)
        return str(run.info.run_id)

    def begin(self, record: TrialRecord) -> MLflowRun:
        """Create the run, and write the hyperparameters."""
        tags = record.tags | {STUDY: self.study.key, TRIAL: record.key, PARENT: self.parent}
        created = self.client.create_run(self.experiment_id, _milliseconds(record.start), tags, record.name)
        run = self._open_run(record, created.info.run_id)
        run.logger.log_hyperparams(record.params)
        return run

    def _open_run(self, record: TrialRecord, run_id: str, known: Points | None = None) -> MLflowRun:
        return MLflowRun(record.key, MLFlowLogger(self.experiment, tracking_uri=self.uri, run_id=run_id), known)

    def _runs(self, key: str | None = None) -> list[Run]:
        """The runs of the study and of its trials, or those of one trial."""
        query = f"tags.{STUDY} = '{self.study.key}'" + ("" if key is None else f" and tags.{TRIAL} = '{key}'")
        runs: list[Run] = []
        token: str | None = None
        while True:
            page = self.client.search_runs([self.experiment_id], query, max_results=PAGE, page_token=token)
            runs, token = [*runs, *page], page.token
            if not token:
                return runs

    def known(self) -> dict[str, Known]:
        """The runs that are final, alone, and nested in the run of the study."""
        found: dict[str, list[Run]] = defaultdict(list)
        for run in self._runs():
            if TRIAL in run.data.tags:
                found[run.data.tags[TRIAL]].append(run)
        return {key: self._known(runs) for key, runs in found.items()}

    def _known(self, runs: list[Run]) -> Known:
        tags, state = runs[0].data.tags, runs[0].data.tags.get(STATE, "")
        final = len(runs) == 1 and tags.get(PARENT) == self.parent and STATUS.get(state) == runs[0].info.status
        return Known(state if final else None, int(tags.get(N_POINTS, -1)))

    def complete(self, record: TrialRecord) -> None:
        """Keep the oldest run of the trial, or create it, and write what it lacks."""
        first, *others = sorted(self._runs(record.key), key=_age) or [None]
        for run in others:  # another process was taken for gone, and has created one too
            self.client.delete_run(run.info.run_id)
        if first is None:
            self.begin(record).end(record)
            return
        run_id = first.info.run_id
        names = first.data.metrics.keys() & record.points.keys()
        known = {
            name: {point.step: point.value for point in self.client.get_metric_history(run_id, name)} for name in names
        }
        run = self._open_run(record, run_id, known)
        self.client.set_tag(run_id, PARENT, self.parent)
        if not record.params.keys() <= first.data.params.keys():
            run.logger.log_hyperparams(record.params)
        run.end(record)

    def end_lost(self, record: TrialRecord) -> None:
        """Set state and status; how many points there are is not said, so that `complete` looks."""
        for run in self._runs(record.key):
            if run.info.status == "RUNNING" and record.state is not None:
                self.client.set_tag(run.info.run_id, STATE, record.state)
                self.client.set_terminated(run.info.run_id, STATUS[record.state], _milliseconds(record.end))

    def end_study(self, summary: Mapping[str, Any], report: Path | None) -> None:
        """The results as metrics and the report as an artifact of the study's run, which is then FINISHED."""
        for name, value in results_of(summary).items():
            self.client.log_metric(self.parent, name, value)
        for run in self._runs():
            if TRIAL not in run.data.tags and run.info.run_id != self.parent:  # another machine has created it too
                self.client.delete_run(run.info.run_id)
        if report is not None:
            self.client.log_artifact(self.parent, str(report))
        self.client.set_terminated(self.parent, "FINISHED")


def _remove_torn(folder: Path, study_key: str) -> None:
    """Delete what a killed process has left without content, with which MLflow can't read the whole experiment.

    In a folder MLflow creates `meta.yaml` of a run, and the file of a metric, before it writes into them. What is
    deleted is written anew by `complete`.

    Args:
        folder: of the experiment.
        study_key: whose runs and metrics are deleted, and runs that have no tags yet.
    """

    def is_ours(run: Path) -> bool:
        tag = run / "tags" / STUDY
        return (tag.read_text() if tag.exists() else study_key) == study_key

    def torn() -> set[Path]:
        runs = {path.parent for path in folder.glob("*/meta.yaml") if path.stat().st_size == 0}
        metrics = {path for path in folder.glob("*/metrics/**/*") if path.is_file() and path.stat().st_size == 0}
        return {one for one in runs | metrics if is_ours(folder / one.relative_to(folder).parts[0])}

    if before := torn():
        time.sleep(TORN_SECONDS)
        for one in before & torn():
            shutil.rmtree(one) if one.is_dir() else one.unlink(missing_ok=True)


def _age(run: Run) -> tuple[int, str]:
    return run.info.start_time, run.info.run_id


def _milliseconds(time: datetime | None) -> int | None:
    return None if time is None else round(time.timestamp() * 1000)
