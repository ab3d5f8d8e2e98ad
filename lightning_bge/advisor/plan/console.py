"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from statistics import fmean

from lightning_bge.advisor.plan.cost_model import HOUR, Level, TrialCost, money
from lightning_bge.advisor.plan.cost_model import hours as in_words
from lightning_bge.advisor.plan.plan import Plan
from lightning_bge.advisor.plan.scenarios import WhatIf


def describe_plan(plan: Plan) -> str:
    """The plan, to be read in a terminal: the hours first, and what is wrong before anything else."""
    planned, found = plan.planned, plan.prediction
    steps = planned.steps
    split = "a single split" if steps.folds == 1 else f"{steps.folds} folds"
    workers = "1 worker" if planned.workers == 1 else f"{planned.workers} workers"
    lines = [
        *(f"!! {problem}" for problem in plan.problems),
        f"{plan.study}: {planned.trials:,} trials, {split}, at most {steps.epochs} epochs each, pruner "
        f"{planned.pruner.name}, {workers}",
        f"it takes about {clock(found.mid)} ({clock(found.low)} to {clock(found.high)} in eight studies of ten)",
        *_money(plan),
        *_deadline(plan),
        "",
        *_parts(plan),
        "",
        "hours at each level of optimisation, one after the other",
        *(f"  {line}" for line in table_of_levels(plan.levels)),
        f"  = {in_words(found.mid / HOUR)} with the start, the end"
        + (" and the best trials with other seeds" if planned.seeds else ""),
        "",
        "compiling the encoder's layers",
        *(f"  {line}" for line in plan.compiling),
        "",
        "what if",
        *(f"  {_what_if(one)}" for one in plan.what_ifs),
        "",
        "assumed",
        *(f"  {line}" for line in plan.assumed),
    ]
    return "\n".join(lines)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, days before them."""
    return str(timedelta(seconds=round(seconds)))


def table_of_levels(levels: Sequence[Level]) -> list[str]:
    """One line a level: name, hours, how they are known, and the arithmetic that leads there."""
    width = max(len(level.name) for level in levels)
    return [
        f"{level.name:<{width}}  {in_words(level.hours):>8}  {level.basis:<10}  {level.how}".rstrip()
        for level in levels
    ]


def _money(plan: Plan) -> list[str]:
    if plan.price is None:
        return []
    hours = plan.prediction.mid / HOUR * plan.planned.workers
    return [f"it costs about {money(hours, plan.price):,.2f}: {hours:.2f} worker hours x {plan.price:g}"]


def _deadline(plan: Plan) -> list[str]:
    if plan.deadline is None:
        return []
    if not plan.late:
        return [f"it is in time: there are {in_words(plan.deadline)}"]
    may = in_words(plan.prediction.high / HOUR)
    lines = ["", f"!! TOO LONG: there are {in_words(plan.deadline)}, and it may take {may}."]
    if plan.fixes:
        lines.append("!! What would be in time, what costs the least quality first:")
    else:
        lines.append("!! No number of trials or workers would be in time: take shorter texts or a smaller model.")
    return [*lines, *(f"!!   {_what_if(fix)}" for fix in plan.fixes)]


def _parts(plan: Plan) -> list[str]:
    calibration, study, found = plan.calibration, plan.planned, plan.prediction
    how = "given by hand, nothing was measured"
    if calibration.took:
        points = len(calibration.draws)
        how = f"measured in {calibration.took:.0f} s on {points} point{'s'[: points > 1]} of the space"
        how += f"; a step's mean is known to +-{calibration.error:.1%}"
    cost = TrialCost(
        **{name: fmean(getattr(draw.cost, name) for draw in calibration.draws) for name in _PARTS},
        epochs=study.steps.epochs,
    )
    each = cost.total(study.steps)
    low, _, high = found.share
    return [
        how,
        f"  a trial to its end: {study.steps.folds} x (fold {cost.fold:.2f} s + {study.steps.epochs} x (steps "
        f"{cost.train:.2f} s + validation {cost.validation * study.steps.per_epoch:.2f} s + {cost.epoch:.2f} s)) "
        f"+ {cost.visit:.2f} s = {in_words(each / HOUR)}",
        f"  {study.trials:,} of them: {in_words(found.full / HOUR)}; pruned: {found.search / found.full:.0%} of that "
        f"({low:.0%} to {high:.0%}), {in_words(found.search / HOUR)}; about {found.complete:.0f} run to their end",
        f"  before and after: {in_words(found.around / HOUR)} (a process starts in {calibration.start:.1f} s, its "
        f"first trial takes {calibration.first:.1f} s more, the end {calibration.finish:.1f} s and the refit)",
    ]


_PARTS = ("visit", "fold", "epoch", "train", "validation")


def _what_if(one: WhatIf) -> str:
    hours = f"{in_words(one.mid)} ({in_words(one.low)} to {in_words(one.high)})"
    return f"{one.change}: {hours}    {one.setting}"
