"""Plan a study: measure what its trials take, predict its hours, and find what would change them."""

import math
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning_bge.advisor.plan.calibrate import calibrate
from lightning_bge.advisor.plan.config import GivenFigures, PlanConfig
from lightning_bge.advisor.plan.cost_model import (
    HOUR,
    Calibration,
    MeasuredTrial,
    ParameterSets,
    TrialCost,
    features,
    format_hours,
)
from lightning_bge.advisor.plan.levels import (
    Level,
    Variants,
    compile_attempt,
    describe_break_even,
    measure_variants,
    optimization_levels,
)
from lightning_bge.advisor.plan.planned_trials import DataSize, ModuleTrials, PlannedTrials
from lightning_bge.advisor.plan.predict import Prediction, Scenario, StudyCosts, predict
from lightning_bge.advisor.plan.short_study import InEffect, ShortStudy
from lightning_bge.advisor.plan.what_if import (
    WHAT_IF_RUNS,
    Changes,
    WhatIf,
    assumptions,
    check_calibration,
    check_study,
)
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.experiment import Experiment
from lightning_bge.hpo.space.parameter_sets import draw_parameter_sets, parse_enqueued
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.steps import Steps


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
        break_even: when compiling pays off, as text; None: modules of other projects are not compiled.
        what_ifs: changes, and the hours of the changed study.
        warnings: about the study and the measurement.
        by_batches: whether the data are another project's, whose batches alone are known.
        fixes: changes that meet the deadline, those with the least effect on the quality of the result first.
    """

    study: str
    scenario: Scenario
    options: PlanConfig
    prediction: Prediction
    calibration: Calibration
    levels: tuple[Level, ...]
    break_even: str | None
    what_ifs: tuple[WhatIf, ...]
    warnings: tuple[str, ...]
    by_batches: bool = False
    fixes: tuple[WhatIf, ...] = ()

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the figures assume besides the measurement."""
        return tuple(assumptions(self.scenario, self.calibration.took > 0, self.by_batches))

    @property
    def late(self) -> bool:
        """Whether the study may miss its deadline."""
        return self.prediction.high / HOUR > (self.options.deadline or math.inf)

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
            *(f"  {line}" for line in self.levels),
            f"  total: {format_hours(found.mid / HOUR)}, with start and end{replicates}",
            *([] if self.break_even is None else [f"  {self.break_even}"]),
            "",
            "what if",
            *(f"  {one}" for one in self.what_ifs),
            "",
            "assumptions",
            *(f"  {line}" for line in self.assumptions),
        ]
        return "\n".join(lines)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _deadline(plan: Plan) -> list[str]:
    if plan.options.deadline is None:
        return []
    deadline = format_hours(plan.options.deadline)
    if not plan.late:
        return [f"deadline {deadline}: met"]
    head = f"DEADLINE MISSED: the study may take {format_hours(plan.prediction.high / HOUR)}, more than {deadline}."
    if not plan.fixes:
        return [head, "No number of trials or workers meets it: use shorter texts or a smaller model."]
    best_first = "Changes that meet it, those with the least effect on the quality of the result first:"
    return [head, best_first, *(f"  {fix}" for fix in plan.fixes)]


def _parts(plan: Plan) -> list[str]:
    known, scenario, found = plan.calibration, plan.scenario, plan.prediction
    steps, (low, _, high) = scenario.steps, found.share
    names = ("start", "fold", "epoch", "train", "validation")
    parts = {name: fmean(getattr(trial.cost, name) for trial in known.trials) for name in names}
    cost = TrialCost(**parts, epochs=steps.epochs)
    return [
        f"measured in {known.took:.0f} s; parameter sets: {len(known.trials)}; standard error of the step time "
        f"{known.error:.1%}"
        if known.took
        else "figures as given, nothing was measured",
        f"  complete trial: {steps.folds} x (fold {cost.fold:.2f} s + {steps.epochs} x (steps {cost.train:.2f} s + "
        f"validation {cost.validation * steps.per_epoch:.2f} s + {cost.epoch:.2f} s)) + {cost.start:.2f} s = "
        f"{format_hours(cost.total(steps) / HOUR)}",
        f"  {scenario.n_trials:,} trials: {format_hours(found.unpruned / HOUR)}; with pruning "
        f"{found.pruned / found.unpruned:.0%} of that ({low:.0%} to {high:.0%}), {format_hours(found.pruned / HOUR)}; "
        f"about {found.complete:.0f} complete trials",
        f"  start and end: {format_hours(found.start_and_end / HOUR)} (start of a process {known.start:.1f} s, excess "
        f"of its first trial {known.first_trial:.1f} s, end {known.end:.1f} s, refit, configured hyperparameters)",
    ]


DRAWN = 256  # parameter sets, from which those of the trials are drawn
ENDS = 0.15  # seconds in which a process ends, over those in which it starts: 0.14 to 0.18 were measured


def make_plan(experiment: Experiment, hpo: StudyConfig, options: PlanConfig, process_s: float = 0.0) -> Plan:
    """Measure trials of a study, predict its hours, and find what would change them.

    Args:
        experiment: makes the objects of the trials.
        hpo: options of the study.
        options: of the plan.
        process_s: seconds from the start of a process of the study to its first line; 0 for a study in this process.

    Raises:
        ConfigError: options contradict each other, or the study can't be trained.
    """
    space, given = parse_space(hpo.space), options.given
    experiment.check_space(hpo, space)
    experiment.set_up()
    steps = Steps(experiment.num_folds, experiment.most_epochs(space), hpo.reports_per_epoch)
    warnings, pruner = check_study(hpo, steps)
    enqueued = parse_enqueued(hpo.enqueue, space)
    drawn = draw_parameter_sets(space, enqueued, DRAWN + len(enqueued))
    sets = ParameterSets(space, drawn, experiment.config["trainer.max_epochs"] or steps.epochs, len(enqueued))
    planned = PlannedTrials.of(experiment, hpo)
    in_effect, variants = None, Variants()
    if given.step_ms is None:
        calibration, in_effect, variants = _measure(planned, experiment, hpo, options, sets)
    else:
        calibration = _as_given(planned, given, sets)
    start = process_s * (1 + ENDS) + calibration.start if given.start_s is None else given.start_s
    calibration = replace(calibration, start=start)
    warnings += check_calibration(calibration)
    scenario = Scenario(
        n_trials=hpo.n_trials,
        steps=steps,
        pruner=pruner,
        workers=options.workers,
        seed_replicates=hpo.n_seed_replicates,
        refit=hpo.refit,
        baseline=hpo.baseline,
        learns=hpo.sampler.name == "tpe",
        patience=experiment.monitor.patience,
        min_delta=experiment.monitor.min_delta,
    )
    costs = StudyCosts.of(calibration, sets)
    share = predict(scenario, costs, WHAT_IF_RUNS).share[1]
    costs = replace(costs, compile_s=compile_attempt(scenario, costs, share, planned.compile)[0])
    prediction = predict(scenario, costs)
    changes = Changes(scenario, costs, planned.val_fraction, hpo.cost is not None)
    by_batches = isinstance(planned, ModuleTrials)
    found = Plan(
        study=experiment.run_dir.name,
        scenario=scenario,
        options=options,
        prediction=prediction,
        calibration=calibration,
        levels=tuple(optimization_levels(scenario, costs, prediction, variants, in_effect, planned.compile)),
        break_even=None if by_batches else describe_break_even(scenario, costs, prediction.share[1], given),
        what_ifs=tuple(changes.usual()),
        warnings=tuple(warnings),
        by_batches=by_batches,
    )
    return replace(found, fixes=tuple(changes.meeting(options.deadline))) if options.deadline and found.late else found


def _measure(
    planned: PlannedTrials, experiment: Experiment, hpo: StudyConfig, options: PlanConfig, sets: ParameterSets
) -> tuple[Calibration, InEffect, Variants]:
    """Measure on this machine; the start is that of a process besides its imports."""
    experiment.build({})  # reads what later calls find in memory
    since = time.perf_counter()
    experiment.build({})
    start = planned.builds_at_start(sets) * (time.perf_counter() - since)
    run_dir = experiment.run_dir
    near = next((p for p in (run_dir, *run_dir.absolute().parents) if os.access(p, os.W_OK)), None)
    # on the disk of the study, as checkpoints are written there
    with tempfile.TemporaryDirectory(prefix=".lightning-bge-plan-", dir=near) as folder:
        study = ShortStudy(planned, hpo, Path(folder))
        found = calibrate(study, sets, options.seconds, experiment.num_folds)
        planned.encoder.clear()
        left = max(0.0, options.seconds - found.took)
        variants = measure_variants(planned, found.trials[0], study.timer.in_effect, left)
    return replace(found, start=start), study.timer.in_effect, variants


def _as_given(planned: PlannedTrials, given: GivenFigures, sets: ParameterSets) -> Calibration:
    """What a study takes on another machine, on which nothing is measured."""
    assert given.step_ms is not None
    size: DataSize = planned.size(sets.params[0])
    step_s = given.step_ms / 1000
    train = size.steps * step_s
    cost = TrialCost(0.0, 1.0, 0.0, train, train / size.train * size.validation / 3, epochs=sets.epochs)
    params = sets.params[0]
    trial = MeasuredTrial(params, features(params, sets.space), cost, step_s, train / size.train, 0.0)
    return Calibration((trial,), refit_epoch=train / size.train * size.all, steps=size.steps)
