"""Warnings of a plan: about the study, about the measurement, and what the figures assume."""

from __future__ import annotations

from lightning_bge.advisor.plan.calibration import Calibration
from lightning_bge.advisor.plan.predict import DRIFT
from lightning_bge.advisor.plan.scenario import Scenario
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.config import PrunerConfig, check_pruner
from lightning_bge.hpo.steps import Steps


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
        found.append("learning curves are like the generated ones, of four kinds")
        if scenario.learns and scenario.pruner.name == "asha":
            found.append("a parameter set that TPE suggests is better than 50 to 76% of those before it")
    found.append("hyperparameters are drawn evenly over the space; a sampler may prefer slow or fast ones")
    if scenario.workers > 1:
        found.append("each worker has its own device, as fast as this one")
    return found
