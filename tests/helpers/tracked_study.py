"""A study whose trials do no training and end in every way there is, with its runs in experiment trackers.

    python -m tests.helpers.tracked_study RUN '["tensorboard", {"name": "mlflow", "tracking_uri": "..."}]'

The process kills itself in some trials. Run it until it ends with status 0. With a number as a third argument the
study has so many of its parameter sets; none of the first four kills the process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import optuna

from lightning_bge.hpo.steps import Report
from lightning_bge.hpo.tracked_study import complete_runs, mark_tracked, track
from lightning_bge.hpo.trackers.config import check_trackers
from lightning_bge.hpo.trackers.tracking import Tracking
from lightning_bge.hpo.trials import PAUSED_AT, RETRY_OF
from lightning_bge.runtime.stop import Stopped
from tests.helpers.fake_study import fake_config, open_fake
from tests.helpers.study_run import run_study

# how the trials end, by their hyperparameter x
FATES = {
    0.1: "complete",
    0.2: "pruned",
    0.3: "paused",
    0.4: "failed",
    0.5: "killed in training",
    0.6: "interrupted",
    0.7: "killed before its run",
}
STEPS = 8  # of a trial
END = 3  # the step at which those end that do not end well


def objective_of(tracking: Tracking) -> object:
    """Trains nothing, and reports as `Objective` does."""

    def objective(trial: optuna.Trial) -> float:
        fate = FATES[trial.suggest_float("x", 0.0, 1.0)]
        first = RETRY_OF not in trial.user_attrs
        if fate == "killed before its run" and first:
            os.kill(os.getpid(), signal.SIGKILL)
        tracking.begin(trial)
        folds: list[list[Report]] = []
        try:
            for step in range(1, STEPS + 1):
                if step % 4 == 1:
                    folds.append([])
                trial.report(step / 16, step)
                folds[-1].append(Report(step, step / 8, 0.0, 0.0, 0.0, 0.0, 1.0 / step))
                tracking.report(trial, folds)
                if step == END:
                    _end(trial, fate if first else "complete")
        finally:
            trial.set_user_attr("curve", folds)
            tracking.report(trial, folds)
            tracking.flush()
        return STEPS / 16

    return objective


def _end(trial: optuna.Trial, fate: str) -> None:
    if fate == "killed in training":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "interrupted":
        raise Stopped("SIGTERM")
    if fate == "failed":
        raise ValueError("no such luck")
    if fate == "paused":
        trial.set_user_attr(PAUSED_AT, END)
    if fate in ("paused", "pruned"):
        raise optuna.TrialPruned


def main() -> None:
    """Run what is left of the study, and end it."""
    run_dir, trackers = Path(sys.argv[1]), json.loads(sys.argv[2])
    check_trackers(trackers)
    enqueue = [{"x": x} for x in FATES][: int(sys.argv[3]) if len(sys.argv) > 3 else None]
    space = {"x": {"low": 0.0, "high": 1.0}}
    n_trials = sum(FATES[one["x"]] != "failed" for one in enqueue)  # those that fail do not count
    config = fake_config(n_trials=n_trials, space=space, enqueue=enqueue, trackers=trackers)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = open_fake(run_dir, config)
    mark_tracked(study, None)
    tracking = track(study, config, run_dir)
    report = tracking.reporting(lambda study, trial: print(trial.number, trial.state.name))
    run_study(study, objective_of(tracking), config, run_dir, enqueued=config.enqueue, report=report)  # type: ignore[arg-type]
    complete_runs(tracking, study)
    page = run_dir / "report.html"
    page.write_text("<p>the report</p>")
    tracking.end_study({"best_value": 0.5, "best_trial": 0}, page)
    tracking.close()


if __name__ == "__main__":
    main()
