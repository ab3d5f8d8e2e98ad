"""The time left of a running study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from lightning_bge.hpo.config import FINISHED, StudyConfig
from lightning_bge.hpo.forecast.eta import Eta, SearchOptions, being_run, estimate_end
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Steps


def time_left(study: optuna.Study, seed_replicates: Sequence[FrozenTrial], options: Mapping[str, Any]) -> Eta | None:
    """Estimate how long a running study still takes, seed replicates and refit included.

    Args:
        study: of `lightning-bge hpo`.
        seed_replicates: the trials of its seed replicates.
        options: the section `hpo` of the run's config.yaml; empty where there is none.

    Returns:
        None where nothing is running, no trial has ended, or the options do not have the number of trials.
    """
    trials = study.get_trials(deepcopy=False)
    running = being_run([*trials, *seed_replicates])
    n_trials = options.get("n_trials")
    if not running or n_trials is None:
        return None
    maximized = study.directions[0] == StudyDirection.MAXIMIZE
    direction: Literal["maximize", "minimize"] = "maximize" if maximized else "minimize"
    search = SearchOptions(
        PrunerConfig(**(options.get("pruner") or {})),
        n_trials,
        Steps(**study.user_attrs["steps"]),
        direction,
        sampler=options.get("sampler", "tpe"),
        n_seeds=StudyConfig(n_trials=n_trials, seed_replicates=options.get("seed_replicates")).n_seed_replicates,
        refit=bool(options.get("refit", True)),
    )
    n_replicated = sum(trial.state in FINISHED for trial in seed_replicates)
    return estimate_end(trials, search, len(running), datetime.now(), n_replicated)
