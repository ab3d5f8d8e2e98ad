"""Runs in Weights & Biases: a group for each study, with a run for each trial and one for the study."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger

from lightning_bge.hpo.trackers.config import wandb_mode
from lightning_bge.hpo.trackers.record import Points, StudyRecord, TrialRecord
from lightning_bge.hpo.trackers.tracker import Known, Tracker, TrialRun, results_of
from lightning_bge.runtime.run_folder import create_run_dir, write_text

STEP = "trainer/global_step"  # the axis that Lightning's logger writes
STATE, N_POINTS = "state", "n_points"  # in a run's summary
# W&B shows a run as finished with exit code 0, and else as failed; 255 is that of Ctrl-C
EXIT_CODES = {"complete": 0, "pruned": 0, "paused": 0, "failed": 1, "killed": 255}
FINAL = "lightning-bge-final.txt"  # in the folder of an offline run, which W&B can't read: its state and points


class WandbRun(TrialRun):
    """The run of a trial."""

    logger: WandbLogger

    def end(self, record: TrialRecord) -> None:
        """The last points, the value, how the trial ended, and the state."""
        self.log(record)
        assert record.state is not None
        run: Any = self.logger.experiment
        run.config.update({"trial": record.tags}, allow_val_change=True)
        run.summary.update(record.values | {STATE: record.state, N_POINTS: record.n_points})
        run.tags = (record.kind, record.state)
        folder = Path(run.dir).parent
        run.finish(exit_code=EXIT_CODES[record.state])
        if run.offline:
            write_text(folder / FINAL, f"{record.state} {record.n_points}")


class WandbTracker(Tracker):
    """The runs of a study in Weights & Biases.

    Options: `project` (else WANDB_PROJECT, else `lightning-bge`), `entity` (else WANDB_ENTITY) and `mode` (else
    WANDB_MODE, else `online`). Files are written below the run folder, or below WANDB_DIR.
    """

    name = "wandb"

    def __init__(self, options: Mapping[str, str], study: StudyRecord) -> None:
        super().__init__(options, study)
        self.project = options.get("project") or os.environ.get("WANDB_PROJECT") or "lightning-bge"
        self.entity = options.get("entity") or os.environ.get("WANDB_ENTITY")
        self.mode = wandb_mode(options)
        self.group = f"{study.name}-{study.key[:6]}"
        self.folder = Path(os.environ.get("WANDB_DIR") or study.run_dir)

    def open(self) -> None:
        """Make the folder of local files; W&B creates projects with their first run."""
        create_run_dir(self.folder)

    def begin(self, record: TrialRecord) -> WandbRun:
        """Create the run, and write the hyperparameters."""
        return self._open_run(record)

    def _open_run(self, record: TrialRecord, known: Points | None = None) -> WandbRun:
        run = self._init(record.key, record.name, record.kind)
        logger = WandbLogger(experiment=run, project=self.project)
        logger.log_hyperparams({**record.params, "trial": record.tags})
        return WandbRun(record.key, logger, known)

    def _init(self, key: str, name: str, kind: str) -> Any:
        import wandb

        run = wandb.init(
            entity=self.entity,
            project=self.project,
            group=self.group,
            job_type=kind,
            id=key,
            name=name,
            dir=str(self.folder),
            mode=self.mode,
            resume="allow",
            reinit="create_new",  # a run of the user's own, such as that of a notebook, goes on
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        return run

    def known(self) -> dict[str, Known]:
        """What the server has, or what the folders of offline runs say."""
        if self.mode == "online":
            return {run.id: _known_of(run) for run in self._server_runs()}
        found = {}
        for path in (self.folder / "wandb").glob(f"offline-run-*/{FINAL}"):
            state, n_points = path.read_text().split()
            found[path.parent.name.rpartition("-")[2]] = Known(state, int(n_points))
        return found

    def _server_runs(self) -> list[Any]:
        import wandb

        api = wandb.Api()
        path = f"{self.entity or api.default_entity}/{self.project}"
        try:
            return list(api.runs(path, filters={"group": self.group}))
        except ValueError as error:  # so the package says that there is no such project yet
            if "Could not find project" in str(error):
                return []
            raise

    def complete(self, record: TrialRecord) -> None:
        """Write what the run on the server lacks; an offline run can't be read, and is written anew."""
        known: dict[str, dict[int, float]] = defaultdict(dict)
        if self.mode == "online":
            for run in self._server_runs():
                for row in run.scan_history() if run.id == record.key else ():
                    for name in record.points.keys() & row.keys():
                        known[name][row[STEP]] = row[name]
        else:
            self._remove_offline(record.key)
        self._open_run(record, known).end(record)

    def _remove_offline(self, key: str) -> None:
        for folder in (self.folder / "wandb").glob(f"offline-run-*-{key}"):
            shutil.rmtree(folder)

    def end_study(self, summary: Mapping[str, Any], report: Path | None) -> None:
        """A run of the study in the group, with the results, and the report as a file."""
        key = f"{self.study.key}-study"
        if self.mode == "offline":
            self._remove_offline(key)
        run = self._init(key, self.study.name, "study")
        run.summary.update({**results_of(summary), "best_params": summary.get("best_params")})
        if report is not None:
            copy = shutil.copy(report, run.dir)  # else a link, to what a later call may replace
            run.save(copy, base_path=run.dir, policy="now")
        run.finish()


def _known_of(run: Any) -> Known:
    ended = run.state in ("finished", "failed", "killed")
    return Known(run.summary.get(STATE) if ended else None, int(run.summary.get(N_POINTS, -1)))
