"""A plan, and its text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from statistics import fmean
from typing import Any

from lightning_bge.advisor.plan.calibration import Calibration
from lightning_bge.advisor.plan.checks import assumptions
from lightning_bge.advisor.plan.config import PlanConfig
from lightning_bge.advisor.plan.cost_model import HOUR, TrialCost, format_hours
from lightning_bge.advisor.plan.levels import Level
from lightning_bge.advisor.plan.predict import Prediction, is_late
from lightning_bge.advisor.plan.scenario import Scenario
from lightning_bge.advisor.plan.what_if import WhatIf


@dataclass(frozen=True)
class Plan:
    """The estimated hours of a study. `print` shows it as text.

    Attributes:
        study: its name.
        scenario: what is run.
        options: of the plan.
        prediction: its seconds.
        calibration: what its trials take.
        levels: hours at each optimization level.
        break_even: when compiling pays off, as text.
        what_ifs: changes, and the hours of the changed study.
        fixes: changes that meet the deadline, those with the least effect on the quality of the result first.
        warnings: about the study and the measurement.
    """

    study: str
    scenario: Scenario
    options: PlanConfig
    prediction: Prediction
    calibration: Calibration
    levels: tuple[Level, ...]
    break_even: str
    what_ifs: tuple[WhatIf, ...]
    fixes: tuple[WhatIf, ...]
    warnings: tuple[str, ...]

    @property
    def late(self) -> bool:
        """Whether the study may miss its deadline."""
        deadline = self.options.deadline
        return deadline is not None and is_late(self.prediction, deadline)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the figures assume besides the measurement."""
        return tuple(assumptions(self.scenario, self.calibration.took > 0))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"assumptions": self.assumptions}

    def __str__(self) -> str:
        scenario, found = self.scenario, self.prediction
        steps = scenario.steps
        split = "a single split" if steps.folds == 1 else f"{steps.folds} folds"
        workers = "1 worker" if scenario.workers == 1 else f"{scenario.workers} workers"
        replicates = " and the seed replicates" if scenario.seed_replicates else ""
        lines = [
            *(f"WARNING: {warning}" for warning in self.warnings),
            f"{self.study}: {scenario.n_trials:,} trials, {split}, at most {steps.epochs} epochs per fold, pruner "
            f"{scenario.pruner.name}, {workers}",
            f"estimated time {_clock(found.mid)} (80% interval {_clock(found.low)} to {_clock(found.high)})",
            *_deadline(self),
            "",
            *_parts(self),
            "",
            "hours at each optimization level, each row in addition to those above",
            *(f"  {line}" for line in table_of_levels(self.levels)),
            f"  total: {format_hours(found.mid / HOUR)}, with start and end{replicates}",
            f"  {self.break_even}",
            "",
            "what if",
            *(f"  {_what_if(one)}" for one in self.what_ifs),
            "",
            "assumptions",
            *(f"  {line}" for line in self.assumptions),
        ]
        return "\n".join(lines)


def table_of_levels(levels: Sequence[Level]) -> list[str]:
    """One line for each level: name, hours, how they are known, and the arithmetic that leads there."""
    width = max(len(level.name) for level in levels)
    return [
        f"{level.name:<{width}}  {format_hours(level.hours):>8}  {level.basis:<13}  {level.how}" for level in levels
    ]


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _deadline(plan: Plan) -> list[str]:
    if plan.options.deadline is None:
        return []
    deadline = format_hours(plan.options.deadline)
    if not plan.late:
        return [f"deadline {deadline}: met"]
    lines = [
        "",
        f"DEADLINE MISSED: the study may take {format_hours(plan.prediction.high / HOUR)}, more than {deadline}.",
    ]
    if not plan.fixes:
        return [*lines, "No number of trials or workers meets it: use shorter texts or a smaller model."]
    lines.append("Changes that meet it, those with the least effect on the quality of the result first:")
    return [*lines, *(f"  {_what_if(fix)}" for fix in plan.fixes)]


_PARTS = ("start", "fold", "epoch", "train", "validation")


def _parts(plan: Plan) -> list[str]:
    known, scenario, found = plan.calibration, plan.scenario, plan.prediction
    steps, trials = scenario.steps, known.trials
    how = "figures as given, nothing was measured"
    if known.took:
        sets = "1 parameter set" if len(trials) == 1 else f"{len(trials)} parameter sets"
        how = f"measured in {known.took:.0f} s with {sets}; standard error of the step time {known.error:.1%}"
    parts = {name: fmean(getattr(trial.cost, name) for trial in trials) for name in _PARTS}
    cost = TrialCost(**parts, epochs=steps.epochs)
    low, _, high = found.share
    return [
        how,
        f"  complete trial: {steps.folds} x (fold {cost.fold:.2f} s + {steps.epochs} x (steps {cost.train:.2f} s + "
        f"validation {cost.validation * steps.per_epoch:.2f} s + {cost.epoch:.2f} s)) + {cost.start:.2f} s = "
        f"{format_hours(cost.total(steps) / HOUR)}",
        f"  {scenario.n_trials:,} trials: {format_hours(found.unpruned / HOUR)}; with pruning "
        f"{found.pruned / found.unpruned:.0%} of that ({low:.0%} to {high:.0%}), {format_hours(found.pruned / HOUR)}; "
        f"about {found.complete:.0f} complete trials",
        f"  start and end: {format_hours(found.start_and_end / HOUR)} (start of a process {known.start:.1f} s, excess "
        f"of its first trial {known.first_trial:.1f} s, end {known.end:.1f} s, refit)",
    ]


def _what_if(one: WhatIf) -> str:
    hours = f"{format_hours(one.mid)} ({format_hours(one.low)} to {format_hours(one.high)})"
    return f"{one.change}: {hours}    {one.flags}"
