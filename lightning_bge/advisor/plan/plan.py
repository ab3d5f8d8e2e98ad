"""Plan a study: measure what its trials take, predict its hours, and find what would change them."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from lightning_bge.advisor.plan.calibrate import calibrate
from lightning_bge.advisor.plan.calibration import Calibration, MeasuredTrial, ParameterSets, features
from lightning_bge.advisor.plan.checks import check_calibration, check_study
from lightning_bge.advisor.plan.config import GivenFigures, PlanConfig
from lightning_bge.advisor.plan.cost_model import TrialCost
from lightning_bge.advisor.plan.levels import (
    Variants,
    compile_attempt,
    describe_break_even,
    measure_variants,
    optimization_levels,
)
from lightning_bge.advisor.plan.predict import predict
from lightning_bge.advisor.plan.result import Plan
from lightning_bge.advisor.plan.scenario import Scenario, StudyCosts
from lightning_bge.advisor.plan.short_study import DataSize, InEffect, ShortStudy
from lightning_bge.advisor.plan.what_if import WHAT_IF_RUNS, Changes
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.experiment import Experiment
from lightning_bge.hpo.space.parameter_sets import draw_parameter_sets, parameter_sets_to_check, parse_enqueued
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.steps import Steps

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
    data = experiment.datamodule
    data.setup("fit")
    steps = Steps(data.num_folds, experiment.most_epochs(space), hpo.reports_per_epoch)
    warnings, pruner = check_study(hpo, steps)
    enqueued = parse_enqueued(hpo.enqueue, space)
    drawn = draw_parameter_sets(space, enqueued, DRAWN + len(enqueued))
    sets = ParameterSets(space, drawn, experiment.config["trainer.max_epochs"] or steps.epochs, len(enqueued))
    in_effect, variants = None, Variants()
    if given.step_ms is None:
        calibration, in_effect, variants = _measure(experiment, hpo, options, sets)
    else:
        calibration = _as_given(DataSize.of(data), given, sets)
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
        learns=hpo.sampler == "tpe",
        patience=experiment.monitor.patience,
        pruned_cost=given.pruned_cost,
    )
    costs = StudyCosts.of(calibration, sets)
    share = predict(scenario, costs, WHAT_IF_RUNS).share[1]
    costs = replace(costs, compile_s=compile_attempt(scenario, costs, share, experiment.compile)[0])
    prediction = predict(scenario, costs)
    changes = Changes(scenario, costs, data.split.val_fraction, hpo.cost is not None)
    return Plan(
        study=experiment.run_dir.name,
        scenario=scenario,
        options=options,
        prediction=prediction,
        calibration=calibration,
        levels=tuple(optimization_levels(scenario, costs, prediction, variants, in_effect, experiment.compile)),
        break_even=describe_break_even(scenario, costs, prediction.share[1], given),
        what_ifs=tuple(changes.usual()),
        fixes=tuple(changes.meeting(options.deadline, prediction)),
        warnings=tuple(warnings),
    )


def _measure(
    experiment: Experiment, hpo: StudyConfig, options: PlanConfig, sets: ParameterSets
) -> tuple[Calibration, InEffect, Variants]:
    """Measure on this machine; the start is that of a process besides its imports."""
    experiment.build({})  # reads what later calls find in memory
    since = time.perf_counter()
    experiment.build({})
    checks = sum(1 for _ in parameter_sets_to_check(sets.space, experiment.config.get)) + sets.enqueued
    start = checks * (time.perf_counter() - since)
    run_dir, encoder = experiment.run_dir, experiment.encoder_cache(hpo)
    near = next((p for p in (run_dir, *run_dir.absolute().parents) if os.access(p, os.W_OK)), None)
    # on the disk of the study, as checkpoints are written there
    with tempfile.TemporaryDirectory(prefix=".lightning-bge-plan-", dir=near) as folder:
        objective = experiment.monitor.objective
        study = ShortStudy(experiment.build, hpo, objective, experiment.compile, encoder, Path(folder))
        found = calibrate(study, sets, options.seconds)
        encoder.clear()
        left = max(0.0, options.seconds - found.took)
        variants = measure_variants(experiment.build, found.trials[0], study.in_effect, left)
    return replace(found, start=start), study.in_effect, variants


def _as_given(size: DataSize, given: GivenFigures, sets: ParameterSets) -> Calibration:
    """What a study takes on another machine, on which nothing is measured."""
    assert given.step_ms is not None
    step_s = given.step_ms / 1000
    train = size.steps * step_s
    cost = TrialCost(0.0, 1.0, 0.0, train, train / size.train * size.validation / 3, epochs=sets.epochs)
    params = sets.params[0]
    trial = MeasuredTrial(params, features(params, sets.space), cost, step_s, train / size.train, 0.0)
    return Calibration((trial,), refit_epoch=train / size.train * size.all, steps=size.steps)
