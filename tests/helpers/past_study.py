"""Studies and trials as plain data, read from a run folder or made by hand."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from lightning_bge.hpo.analysis.history import History, PastTrial, StudyGoal, TrialResult, history_of
from lightning_bge.hpo.analysis.journal import load_study
from lightning_bge.hpo.steps import Steps
from tests.helpers.made_study import START


def history_at(run_dir: Path) -> History:
    """The study of a run folder."""
    loaded = load_study(run_dir)
    assert loaded is not None
    return history_of(*loaded, options_of(run_dir))


def options_of(run_dir: Path) -> dict[str, Any]:
    """The section `hpo` of the configuration of a run folder."""
    return yaml.safe_load((run_dir / "config.yaml").read_text())["hpo"]


def past(number: int, outcome: Any = "complete", start: float = 0.0, end: float = 1.0, **more: Any) -> PastTrial:
    """A trial from `start` to `end`, in hours."""
    return PastTrial(number, outcome, START + timedelta(hours=start), START + timedelta(hours=end), **more)


def complete(number: int, value: float, cost: float | None = None, start: float = 0.0, end: float = 1.0) -> PastTrial:
    """A complete trial from `start` to `end`, in hours."""
    return past(number, "complete", start, end, result=TrialResult(value, cost))


def study_of(*trials: PastTrial, direction: Any = "maximize", **more: Any) -> History:
    """A study of these trials, 24 hours after its start."""
    known: dict[str, Any] = {"goal": StudyGoal("f1", direction), "steps": Steps(2, 3), "n_trials": 9}
    known |= {"pruner": "asha", "space": {}, "seed_replicates": (), "read_at": START + timedelta(hours=24)}
    return History(**{**known, "trials": trials, **more})
