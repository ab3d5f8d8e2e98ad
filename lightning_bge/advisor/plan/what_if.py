"""Warnings about a study, its hours after a change, and the changes that meet a deadline."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from lightning_bge.advisor.plan.cost_model import HOUR, Calibration, format_hours
from lightning_bge.advisor.plan.predict import DRIFT, Scenario, StudyCosts, predict
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.analysis.winner import describe_price
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

    def __str__(self) -> str:
        low, mid, high = map(format_hours, (self.low, self.mid, self.high))
        return f"{self.change}: {mid} ({low} to {high})    {self.flags}"


@dataclass(frozen=True)
class Changes:
    """Predicts the hours of changed studies.

    Attributes:
        scenario: the planned study.
        costs: what its parts take.
        val_fraction: the part of the rows that a single split validates on; None: there is no option for it.
        has_cost: whether the study minimizes a cost as well, so that nothing can prune.
    """

    scenario: Scenario
    costs: StudyCosts
    val_fraction: float | None
    has_cost: bool = False

    def usual(self) -> list[WhatIf]:
        """The changes that every plan shows."""
        now = self.scenario
        found = [
            self.pruner("none" if now.pruner.name != "none" else "asha"),
            self.single_split(),
            self.workers(2 * now.workers),
            self.trials(now.n_trials // 2) if now.n_trials > 1 else None,
        ]
        return [one for one in found if one is not None]

    def meeting(self, deadline: float) -> list[WhatIf]:
        """Changes with which even the upper end of the interval is within so many hours.

        The changes with the least effect on the quality of the result come first.
        """

        def first(make: Callable[[int], WhatIf | None], numbers: Sequence[int]) -> WhatIf | None:
            at = bisect_left(numbers, True, key=lambda number: meets(make(number)))
            return make(numbers[at]) if at < len(numbers) else None

        def meets(one: WhatIf | None) -> bool:
            return one is not None and one.high <= deadline

        now = self.scenario
        found = [
            first(self.workers, range(now.workers + 1, MOST_WORKERS + 1)),
            self.pruner("asha") if now.pruner.name != "asha" else None,
            first(self.trials, range(now.n_trials - 1, 0, -1)),
            self.single_split(),
        ]
        return [one for one in found if one is not None and meets(one)]

    def pruner(self, name: Literal["asha", "none"]) -> WhatIf | None:
        """Another pruner."""
        if name != "none" and self.has_cost:
            return None
        change = "no pruning" if name == "none" else f"pruner {name}"
        return self._change(change, _pruner_flags(self.scenario.pruner, name), pruner=PrunerConfig(name))

    def single_split(self) -> WhatIf | None:
        """A single split instead of folds: each trial is validated on fewer rows, so that scores are less certain.

        It is without pruning if the pruner can't act on one.
        """
        steps, change, flags = self.scenario.steps, "a single split", "--data.split.folds 1"
        if steps.folds == 1 or self.val_fraction is None:
            return None
        train, validation = (1 - self.val_fraction) * steps.folds / (steps.folds - 1), self.val_fraction * steps.folds
        split = replace(self, costs=self.costs.scaled(train, validation))
        steps = replace(steps, folds=1)
        without = f"{flags} {_pruner_flags(self.scenario.pruner, 'none')}"
        return split._change(change, flags, steps=steps) or split._change(
            change, without, steps=steps, pruner=PrunerConfig("none")
        )

    def workers(self, count: int) -> WhatIf | None:
        """More processes, each on its own device."""
        return self._change(f"{count} workers", f"start hpo {count} times", workers=count)

    def trials(self, count: int) -> WhatIf | None:
        """Fewer trials."""
        return self._change(f"{count:,} trials", f"--hpo.n_trials {count}", n_trials=count)

    def _change(self, change: str, flags: str, **fields: Any) -> WhatIf | None:
        """Predict the study with these fields of the scenario replaced; None: its pruner could not prune."""
        scenario = replace(self.scenario, **fields)
        try:
            check_pruner(scenario.pruner, scenario.n_trials, scenario.steps)
        except ConfigError:
            return None
        found = predict(scenario, self.costs, WHAT_IF_RUNS)
        return WhatIf(change, flags, found.low / HOUR, found.mid / HOUR, found.high / HOUR)


def _pruner_flags(now: PrunerConfig, name: str) -> str:
    """The flags that set a pruner with its default options: those that are not default now are reset."""
    flags = [f"--hpo.pruner.name {name}"]
    for option in fields(now):
        if option.name == "init_args" and now.init_args:
            flags.append("--hpo.pruner.init_args '{}'")
        elif option.name not in ("name", "init_args") and getattr(now, option.name) != option.default:
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
    if hpo.outer_folds is not None:
        found.append(f"hpo.outer_folds: {describe_price(hpo.outer_folds)}; these figures are of the final study alone")
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


def assumptions(scenario: Scenario, measured: bool, by_batches: bool = False) -> list[str]:
    """What the figures assume besides the measurement.

    Args:
        scenario: what is run.
        measured: whether anything was measured.
        by_batches: whether the data are another project's, whose batches alone are known.
    """
    found = [
        f"the speed of the machine stays as measured, with a standard deviation of {DRIFT:.0%}"
        if measured
        else "the seconds of a step are as given, and parts that were not given are rough estimates"
    ]
    if by_batches:
        found.append("batches take the same time, and each fold has as many as the first")
    if scenario.pruner.name != "none":
        found.append("learning curves are like the generated ones, of four kinds")
        if scenario.learns and scenario.pruner.name == "asha":
            found.append("a parameter set that TPE suggests is better than 50 to 76% of those before it")
    found.append("hyperparameters are drawn evenly over the space; a sampler may prefer slow or fast ones")
    if scenario.workers > 1:
        found.append("each worker has its own device, as fast as this one")
    return found
