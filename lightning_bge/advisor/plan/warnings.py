"""What of a plan is not to be trusted, what of a study makes no sense, and what is assumed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from lightning_bge.advisor.plan.calibrate import Calibration
from lightning_bge.advisor.plan.predict import DRIFT, Study
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.config import PrunerConfig, check_pruner
from lightning_bge.hpo.steps import Steps

STAT = Path("/proc/stat")
BUSY = 0.3  # cores at work for others, from which on it may matter


def judge_search(hpo: StudyConfig, steps: Steps) -> tuple[list[str], PrunerConfig]:
    """What is wrong with the search, and the pruner that it then really has."""
    found, pruner = [], hpo.pruner
    try:
        check_pruner(pruner, hpo.n_trials, steps)
    except ConfigError as error:
        found.append(f"{error} The figures here are those of a study without pruning; `hpo` would refuse to start.")
        pruner = PrunerConfig("none")
    if pruner.name == "hyperband" and pruner.patience is not None:
        found.append(
            "hpo.pruner.patience around hyperband: a trial that still improves is never pruned, however bad it is"
        )
    if hpo.timeout is not None:
        found.append(
            f"hpo.timeout stops each call of the study after {hpo.timeout:g} s: the figures are of the whole study"
        )
    return found, pruner


class Others:
    """What other processes, and other guests of the same hardware, take of this machine's cores from here on.

    Only Linux tells (`/proc/stat`).
    """

    def __init__(self) -> None:
        self._since = _spent()

    def problems(self) -> list[str]:
        """Nothing, or that too little of the machine was left for what was measured since."""
        now, cores = _spent(), os.cpu_count() or 1
        if self._since is None or now is None:
            return []
        wall, busy, own = (after - before for after, before in zip(now, self._since, strict=True))
        used = max(0.0, busy - own) / wall if wall > 0 else 0.0
        if used < BUSY or used + torch.get_num_threads() <= cores:
            return []
        return [
            f"this machine is busy: {used:.1f} of its {cores} cores worked for others while it was measured. The "
            "figures are of a machine that stays as busy: measure again when it is free"
        ]


def _spent() -> tuple[float, float, float] | None:
    """Seconds: by the clock, of all cores at work or taken by the hypervisor, of this process and its children."""
    if not STAT.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, STAT.read_text().split("\n", 1)[0].split()[1:])
    ticks = user + nice + system + irq + softirq + steal
    return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


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
    if study.learns and study.pruner.name == "asha" and study.survival is None:
        found.append("a point of TPE is better than 50 to 76% of those before it")
    found.append("settings are drawn evenly over the space; a sampler may come to like slow ones, or fast ones")
    if study.workers > 1:
        found.append("each worker has a device of its own, as fast as this one")
    return found
