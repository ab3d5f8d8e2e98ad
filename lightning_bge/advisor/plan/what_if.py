"""Warnings about a study, its hours after a change, and the changes that meet a deadline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

from lightning_bge.advisor.plan.cost_model import HOUR, Calibration
from lightning_bge.advisor.plan.predict import DRIFT, Prediction, Scenario, StudyCosts, is_late, predict
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.config import PrunerConfig, check_pruner
from lightning_bge.hpo.steps import Steps

WHAT_IF_RUNS = 20
MOST_WORKERS = 64


@dataclass(frozen=True)
class WhatIf:
    """A change, and the hours of the changed study.

    Attributes:
        change: description.
        flags: command-line options that make it.
        low: hours, 10 % quantile.
        mid: hours, median.
        high: hours, 90 % quantile.
    """

    change: str
    flags: str
    low: float
    mid: float
    high: float


@dataclass(frozen=True)
class Changes:
    """Predicts the hours of changed studies.

    Attributes:
        scenario: the planned study.
        costs: what its parts take.
        val_fraction: the part of the rows that a single split validates on.
        has_cost: whether the study minimizes a cost as well, so that nothing can prune.
    """

    scenario: Scenario
    costs: StudyCosts
    val_fraction: float
    has_cost: bool = False

    def usual(self) -> list[WhatIf]:
        """The changes that every plan shows."""
        found = [self.pruner("none" if self.scenario.pruner.name != "none" else "asha")]
        if self.scenario.steps.folds > 1:
            found.append(self.single_split())
        found.append(self.workers(2 * self.scenario.workers))
        if self.scenario.n_trials > 1:
            found.append(self.trials(self.scenario.n_trials // 2))
        return [one for one in found if one is not None]

    def meeting(self, deadline: float | None, prediction: Prediction) -> list[WhatIf]:
        """Changes with which even the upper end of the interval meets the deadline; none if the study may meet it.

        The changes with the least effect on the quality of the result come first.

        Args:
            deadline: hours, or None.
            prediction: of the planned study.
        """
        scenario = self.scenario
        if deadline is None or not is_late(prediction, deadline):
            return []
        found: list[WhatIf | None] = [_first_in_time(self.workers, scenario.workers + 1, MOST_WORKERS, deadline)]
        if scenario.pruner.name != "asha":
            found.append(self.pruner("asha"))
        found.append(self._most_trials(deadline))
        if scenario.steps.folds > 1:
            found.append(self.single_split())
        return [one for one in found if one is not None and one.high <= deadline]

    def pruner(self, name: Literal["asha", "none"]) -> WhatIf | None:
        """Another pruner; None: it could not prune."""
        pruner, now = PrunerConfig(name), self.scenario.pruner
        if name != "none" and (self.has_cost or not _can_prune(replace(self.scenario, pruner=pruner))):
            return None
        change = "no pruning" if name == "none" else f"pruner {name}"
        return self._predict(change, _pruner_flags(now, name), replace(self.scenario, pruner=pruner, pruned_cost=None))

    def single_split(self) -> WhatIf:
        """A single split instead of folds: each trial is validated on fewer rows, so that scores are less certain.

        It is without pruning if the pruner can't act on one.
        """
        folds, flags = self.scenario.steps.folds, "--data.split.folds 1"
        scenario = replace(self.scenario, steps=replace(self.scenario.steps, folds=1))
        if not _can_prune(scenario):
            flags = f"{flags} {_pruner_flags(scenario.pruner, 'none')}"
            scenario = replace(scenario, pruner=PrunerConfig("none"))
        costs = self.costs.scaled((1 - self.val_fraction) * folds / (folds - 1), self.val_fraction * folds)
        return replace(self, costs=costs)._predict("a single split", flags, scenario)

    def workers(self, count: int) -> WhatIf:
        """More processes, each on its own device."""
        return self._predict(f"{count} workers", f"start hpo {count} times", replace(self.scenario, workers=count))

    def trials(self, count: int) -> WhatIf | None:
        """Fewer trials; None: the pruner could not prune."""
        scenario = replace(self.scenario, n_trials=count)
        if not _can_prune(scenario):
            return None
        return self._predict(f"{count:,} trials", f"--hpo.n_trials {count}", scenario)

    def _most_trials(self, deadline: float) -> WhatIf | None:
        """As many trials as meet the deadline; None: no number does."""
        most = self.scenario.n_trials - 1
        return _first_in_time(lambda fewer: self.trials(most + 1 - fewer), 1, most, deadline)

    def _predict(self, change: str, flags: str, scenario: Scenario) -> WhatIf:
        found = predict(scenario, self.costs, WHAT_IF_RUNS)
        return WhatIf(change, flags, found.low / HOUR, found.mid / HOUR, found.high / HOUR)


def _first_in_time(make: Callable[[int], WhatIf | None], low: int, high: int, deadline: float) -> WhatIf | None:
    """Bisect for the first of these numbers with which the deadline is met; None: there is none."""
    found = None
    while low <= high:
        middle = (low + high) // 2
        one = make(middle)
        if one is not None and one.high <= deadline:
            found, high = one, middle - 1
        else:
            low = middle + 1
    return found


def _can_prune(scenario: Scenario) -> bool:
    try:
        check_pruner(scenario.pruner, scenario.n_trials, scenario.steps)
    except ConfigError:
        return False
    return True


def _pruner_flags(now: PrunerConfig, name: str) -> str:
    """The flags that set a pruner with its default options: those that are not default now are reset."""
    flags = [f"--hpo.pruner.name {name}"]
    for option in fields(now):
        if option.name != "name" and getattr(now, option.name) != option.default:
            flags.append(f"--hpo.pruner.{option.name} {'null' if option.default is None else option.default}")
    return " ".join(flags)


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
