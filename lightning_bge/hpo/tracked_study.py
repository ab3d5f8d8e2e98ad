"""The runs of a whole study in experiment trackers: those of its trials, seed replicates and baseline."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from lightning_bge.hpo.analysis.journal import has_study, study_names
from lightning_bge.hpo.config import BASELINE, OUTER_FOLDS, SEED_REPLICATES, StudyConfig
from lightning_bge.hpo.trackers.config import parse_trackers
from lightning_bge.hpo.trackers.record import StudyRecord
from lightning_bge.hpo.trackers.tracking import Tracking, open_trackers
from lightning_bge.runtime.compat.optuna import storage_of

TRACKING_KEY = "tracking_key"  # attribute of a study: by which trackers know it, whatever its name and folder


def mark_tracked(study: optuna.Study, base: str | None) -> None:
    """Give a study its key, that of the studies it has taken trials over from. Call it under the lock of the study.

    Args:
        study: the present one.
        base: its first name in a storage that holds other studies too; None: all of them are those of one run.
    """
    if TRACKING_KEY in study.user_attrs:
        return
    storage = storage_of(study)
    earlier = [optuna.load_study(study_name=name, storage=storage) for name in study_names(storage, base)]
    keys = [one.user_attrs[TRACKING_KEY] for one in earlier if TRACKING_KEY in one.user_attrs]
    study.set_user_attr(TRACKING_KEY, keys[-1] if keys else secrets.token_hex(8))


def track(study: optuna.Study, hpo: StudyConfig, run_dir: Path) -> Tracking:
    """The trackers of a study.

    Args:
        study: the study; with trackers it was marked by `mark_tracked`.
        hpo: its options.
        run_dir: the run's folder.
    """
    configs = parse_trackers(hpo.trackers)
    if not configs:
        return Tracking()
    folder = run_dir.resolve()
    inner = folder.parent.name == OUTER_FOLDS
    name = f"{folder.parent.parent.name}-outer-fold-{folder.name}" if inner else hpo.study_name or folder.name
    metric = study.user_attrs["settings"]["monitor.metric"]
    tracking = open_trackers(configs, StudyRecord(study.user_attrs[TRACKING_KEY], name, metric, run_dir))
    tracking.start(_studies(study))
    return tracking


def complete_runs(tracking: Tracking, study: optuna.Study) -> None:
    """Bring the runs of all ended trials up to date. One process at a time."""
    tracking.complete(_studies(study))


def attach_report(
    study: optuna.Study, hpo: StudyConfig, run_dir: Path, summary: Mapping[str, Any], report: Path
) -> None:
    """Write the results and `report.html` of an ended study into its run, where a tracker has one."""
    track(study, hpo, run_dir).end_study(summary, report)


def _studies(study: optuna.Study) -> list[optuna.Study]:
    """A study, and those of its seed replicates and its baseline."""
    storage = storage_of(study)
    names = [f"{study.study_name}{suffix}" for suffix in (SEED_REPLICATES, BASELINE)]
    return [study, *(optuna.load_study(study_name=name, storage=storage) for name in names if has_study(storage, name))]
