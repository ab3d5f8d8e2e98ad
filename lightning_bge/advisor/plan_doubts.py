"""What of a plan is not to be trusted, what of a study makes no sense, and what is assumed."""

from __future__ import annotations

import os

from lightning_bge.advisor.calibrate import Calibration
from lightning_bge.advisor.predict import DRIFT, Study
from lightning_bge.errors import ConfigError
from lightning_bge.hpo import PrunerConfig, Steps, StudyConfig
from lightning_bge.hpo.pruning import check_pruner

BUSY = 0.5  # load of a core, before anything is measured, from which on the machine is not this study's alone


def judge_search(hpo: StudyConfig, steps: Steps) -> tuple[list[str], PrunerConfig]:
    """What is wrong with the search, and the pruner that it then really has."""
    found, pruner = [], hpo.pruner
    try:
        check_pruner(pruner, hpo.trials, steps)
    except ConfigError as error:
        found.append(f"{error} The figures here are those of a study without pruning; `hpo` would refuse to start.")
        pruner = PrunerConfig("none")
    if pruner.name == "disarmed_hyperband" or (pruner.name == "hyperband" and pruner.patience is not None):
        found.append("hpo.pruner.patience disarms Hyperband: whatever still improves is spared, however bad it is")
    if hpo.hours is not None:
        found.append(
            f"hpo.hours stops each call of the study after {hpo.hours:g} h: the figures are of the whole study"
        )
    return found, pruner


def busy() -> list[str]:
    """Whether others use this machine while it is measured."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] / cores if hasattr(os, "getloadavg") else 0.0
    if load < BUSY:
        return []
    return [
        f"this machine is busy: {load * cores:.1f} processes want its {cores} cores. The figures are of a machine that "
        "stays as busy: measure again when it is free"
    ]


def doubts(calibration: Calibration) -> list[str]:
    """What of the measurement is not to be trusted."""
    found = []
    if calibration.missing:
        tried = calibration.missing + len(calibration.draws)
        found.append(
            f"{calibration.missing} of {tried} points of the space ran out of memory: the study will prune such"
        )
    if calibration.took and len(calibration.draws) < 2:
        found.append("there was time for one point of the space only: give --seconds more")
    if calibration.error > 0.1:
        found.append(f"steps differed so much that their mean is +-{calibration.error:.0%}: give --seconds more")
    return found


def assumed(study: Study, by_hand: bool) -> list[str]:
    """What the figures rest on, besides measurements."""
    found = [f"the machine's speed stays as it was measured, +-{DRIFT:.0%} (standard deviation)"]
    if by_hand:
        found[0] = "steps take what was given by hand; what was not given is rough"
    if study.survival is not None:
        found.append(f"the pruner leaves {study.survival:.0%} of the full cost, as given")
    elif study.pruner.name != "none":
        where = "simulated ones of four kinds" if study.curves is None else f"those recorded of {study.curves.name}"
        found.append(f"learning curves are like {where}")
    if study.learns and study.pruner.name == "promote" and study.survival is None:
        found.append("a point of TPE is better than 50 to 76% of those before it")
    found.append("settings are drawn evenly over the space; a sampler may come to like slow ones, or fast ones")
    if study.workers > 1:
        found.append("each worker has a device of its own, as fast as this one")
    return found
