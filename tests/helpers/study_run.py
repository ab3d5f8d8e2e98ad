"""Runs what is left of a study in this process, as `lightning-bge hpo` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.scheduling.study_queue import StudyQueue
from lightning_bge.hpo.scheduling.trial_loop import Evaluate, run_trials
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.study import study_storage
from lightning_bge.runtime.stop import StopRequest

Report = Callable[[optuna.Study, FrozenTrial], None]


def run_study(
    study: optuna.Study,
    objective: Evaluate,
    config: StudyConfig,
    run_dir: Path,
    *,
    enqueued: Sequence[Mapping[str, Any]] = (),
    until: float = math.inf,
    request: StopRequest | None = None,
    report: Report = lambda study, trial: None,
) -> StudyQueue:
    """Run it to its end; returns the queue, which is asked no more."""
    run_dir.mkdir(parents=True, exist_ok=True)
    place = study_storage(run_dir, config)
    with place.worker() as worker:
        queue = StudyQueue(study, place, worker, config, parse_space(config.space), enqueued)
        run_trials(queue, objective, until=until, request=request or StopRequest(), report=report)
    return queue
