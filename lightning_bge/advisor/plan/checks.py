"""Warnings of a plan: about the study, about the measurement, and what the figures assume."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from lightning_bge.advisor.plan.calibration import Calibration
from lightning_bge.advisor.plan.predict import DRIFT
from lightning_bge.advisor.plan.scenario import Scenario
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.config import PrunerConfig, check_pruner
from lightning_bge.hpo.steps import Steps

STAT = Path("/proc/stat")
BUSY = 0.3  # cores that other processes use, from which on it may matter


def check_study(hpo: StudyConfig, steps: Steps) -> tuple[list[str], PrunerConfig]:
    """Warnings about the study, and the pruner for the prediction: none if it could never prune."""
    found, pruner = [], hpo.pruner
    try:
        check_pruner(pruner, hpo.n_trials, steps)
    except ConfigError as error:
        found.append(f"{error} These figures are of a study without pruning; `hpo` would refuse to start.")
        pruner = PrunerConfig("none")
    if pruner.name == "hyperband" and pruner.patience is not None:
        found.append(
            "hpo.pruner.patience around hyperband: a trial that still improves is never pruned, however bad it is"
        )
    if hpo.timeout is not None:
        found.append(f"hpo.timeout ends each call of hpo after {hpo.timeout:g} s; these figures are of the whole study")
    return found, pruner


def check_calibration(calibration: Calibration) -> list[str]:
    """Warnings about the measurement."""
    found = []
    if calibration.out_of_memory:
        tried = calibration.out_of_memory + len(calibration.trials)
        found.append(
            f"{calibration.out_of_memory} of {tried} parameter sets ran out of memory: the study will prune such trials"
        )
    if calibration.took and len(calibration.trials) < 2:
        found.append("there was time to measure only one parameter set: set a larger --seconds")
    if calibration.error > 0.1:
        found.append(f"the standard error of the step time is {calibration.error:.0%}: set a larger --seconds")
    return found


class OtherLoad:
    """The cores that other processes, and other virtual machines on the same host, use from now on (Linux only)."""

    def __init__(self) -> None:
        self._since = _cpu_seconds()

    def warnings(self) -> list[str]:
        """A warning if too few cores were left for the measurement."""
        now, cores = _cpu_seconds(), os.cpu_count() or 1
        if self._since is None or now is None:
            return []
        wall, busy, own = (after - before for after, before in zip(now, self._since, strict=True))
        used = max(0.0, busy - own) / wall if wall > 0 else 0.0
        if used < BUSY or used + torch.get_num_threads() <= cores:
            return []
        return [
            f"other processes used {used:.1f} of the {cores} cores during the measurement. These figures are of a "
            "machine that stays as busy: measure when nothing else runs"
        ]


def _cpu_seconds() -> tuple[float, float, float] | None:
    """Seconds: wall-clock, of all cores in use or taken by the hypervisor, of this process and its children."""
    if not STAT.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, STAT.read_text().split("\n", 1)[0].split()[1:])
    ticks = user + nice + system + irq + softirq + steal
    return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def assumptions(scenario: Scenario, measured: bool) -> list[str]:
    """What the figures assume besides the measurement."""
    found = [
        f"the speed of the machine stays as measured, with a standard deviation of {DRIFT:.0%}"
        if measured
        else "the seconds of a step are as given, and parts that were not given are rough estimates"
    ]
    if scenario.pruned_cost is not None:
        found.append(f"pruning leaves {scenario.pruned_cost:.0%} of the cost, as given")
    elif scenario.pruner.name != "none":
        curves = "the generated ones, of four kinds" if scenario.curves is None else f"those of {scenario.curves.name}"
        found.append(f"learning curves are like {curves}")
        if scenario.learns and scenario.pruner.name == "asha":
            found.append("a parameter set that TPE suggests is better than 50 to 76% of those before it")
    found.append("hyperparameters are drawn evenly over the space; a sampler may prefer slow or fast ones")
    if scenario.workers > 1:
        found.append("each worker has its own device, as fast as this one")
    return found
