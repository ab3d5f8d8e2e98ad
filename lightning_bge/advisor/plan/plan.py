"""Hours before they are spent: what a search will take, what makes it shorter, and whether it makes sense at all."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from lightning_bge.advisor.plan.calibrate import Calibration, Draw, calibrate, features
from lightning_bge.advisor.plan.cost_model import HOUR, Level, TrialCost
from lightning_bge.advisor.plan.levels import describe_compile, levels, measure_variants, trying_s
from lightning_bge.advisor.plan.predict import Prediction, Priced, Study, predict
from lightning_bge.advisor.plan.scenarios import WHAT_IF_RUNS, Changes, WhatIf
from lightning_bge.advisor.plan.trial_bench import Bench, Looks, Sizes
from lightning_bge.advisor.plan.warnings import Others, assumed, doubts, judge_search
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.forecast.recording import Recording
from lightning_bge.hpo.space.parameter_sets import draw_parameter_sets, parse_enqueued
from lightning_bge.hpo.space.search_space import Space, parse_space
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.trial.objective import Build
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.models.metrics import MonitorConfig

POINTS = 256  # of the space, from which the trials' are drawn
ENDS = 0.15  # of the time in which a process starts, it takes to end: 0.14 to 0.18 of it were measured
COMPILE_S = 60.0  # where nothing else is known: the reference case's


@dataclass(frozen=True)
class PlanConfig:
    """The plan.

    Attributes:
        trials: of the study; null: `hpo.n_trials`.
        workers: processes that share the study, each on a device of its own.
        seconds: about how long to measure: real trials, cut short, on this machine. 60, as that is enough for steps of
            a second.
        curves: recorded learning curves (`docs/benchmarks/curves/*.json`) to run the pruner over; null: simulated ones.
        survival: the share of the full cost that the pruner leaves, where it is known from an earlier study.
        deadline: hours that there are; where the study takes longer, what would make it fit is worked out.
        price: of an hour of one worker's machine, in any currency.
        step_ms: milliseconds of an optimizer step, where another machine is meant: nothing is measured then.
        validation_s: seconds of one validation; with step_ms, null takes a third of the training's seconds a row.
        fold_s: seconds to start and end a fold; null: measured, or 1 with step_ms.
        start_s: seconds until a process begins its first trial, and those in which it ends; null: what this one took.
        compile_s: seconds that compiling takes; null: 60.
        compile_gain: share by which compiled steps get shorter. It is assumed: `audit` measures it.
        json: write the plan there too.

    Raises:
        ConfigError: a value is out of range.
    """

    trials: int | None = None
    workers: int = 1
    seconds: float = 60.0
    curves: str | None = None
    survival: float | None = None
    deadline: float | None = None
    price: float | None = None
    step_ms: float | None = None
    validation_s: float | None = None
    fold_s: float | None = None
    start_s: float | None = None
    compile_s: float | None = None
    compile_gain: float = 0.15
    json: str | None = None

    def __post_init__(self) -> None:
        positive = ("trials", "workers", "seconds", "deadline", "step_ms")
        checks: dict[str, tuple[str, Callable[[float], bool]]] = dict.fromkeys(positive, ("above 0", lambda x: x > 0))
        checks |= dict.fromkeys(
            ("price", "validation_s", "fold_s", "start_s", "compile_s"), ("0 or more", lambda x: x >= 0)
        )
        checks |= {"survival": ("above 0 and at most 1", lambda x: 0 < x <= 1)}
        checks |= {"compile_gain": ("from 0 to below 1", lambda x: 0 <= x < 1)}
        for name, (expected, good) in checks.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and good(value)):
                raise ConfigError(f"{name}: expected a number {expected}, or null, got {value}")


class Known(NamedTuple):
    """What the command knows of a search besides its settings.

    Attributes:
        epochs: of a fold, at most.
        usual: epochs of a trial that draws none; None: each draws them.
        process_s: seconds that a process takes until the command begins.
        checks: points that are tried before the first trial.
    """

    epochs: int
    usual: int | None
    process_s: float
    checks: int


@dataclass(frozen=True)
class Search:
    """What is planned: a search as its command would run it.

    Attributes:
        build: makes fresh objects.
        hpo: the search's settings.
        monitor: what its trials are judged by.
        compile: when layers are compiled.
        data: set up.
        run_dir: of the study.
        encoder: loads the models.
        known: what else is known.
    """

    build: Build
    hpo: StudyConfig
    monitor: MonitorConfig
    compile: CompileConfig
    data: TextDataModule
    run_dir: Path
    encoder: EncoderCache
    known: Known

    @cached_property
    def space(self) -> Space:
        """What is searched."""
        return parse_space(self.hpo.space)

    @property
    def steps(self) -> Steps:
        """What a trial that runs to its end reports."""
        return Steps(self.data.num_folds, self.known.epochs, self.hpo.reports_per_epoch)

    @property
    def usual(self) -> int:
        """Epochs of a trial that draws none."""
        return self.known.usual or self.known.epochs


@dataclass(frozen=True)
class Plan:
    """What a search will take.

    Attributes:
        study: its name.
        planned: what decides its hours.
        prediction: of its seconds.
        calibration: what its trials take.
        levels: hours at each level of optimisation.
        compiling: when compiling pays, in words.
        what_ifs: changes, and what they lead to.
        problems: what makes the plan or the study senseless.
        assumed: what the figures rest on, besides measurements.
        deadline: hours that there are, or None.
        fixes: changes that meet it, what costs the least quality first.
        price: of an hour of a worker, or None.
    """

    study: str
    planned: Study
    prediction: Prediction
    calibration: Calibration
    levels: tuple[Level, ...]
    compiling: tuple[str, ...]
    what_ifs: tuple[WhatIf, ...]
    problems: tuple[str, ...]
    assumed: tuple[str, ...]
    deadline: float | None
    fixes: tuple[WhatIf, ...]
    price: float | None

    @property
    def late(self) -> bool:
        """Whether it may take longer than there is time."""
        return self.deadline is not None and self.prediction.high / HOUR > self.deadline

    def as_dict(self) -> dict[str, Any]:
        """Plain data; a recording is named only."""
        found = asdict(replace(self, planned=replace(self.planned, curves=None)))
        curves = self.planned.curves
        return found | {"curves": None if curves is None else curves.name}


def load_calibration(plain: dict[str, Any]) -> Calibration:
    """What `Plan.as_dict` made of a calibration."""
    draws = [Draw(**{**draw, "cost": TrialCost(**draw["cost"])}) for draw in plain["draws"]]
    return Calibration(**{**plain, "draws": tuple(draws)})


def make_plan(search: Search, options: PlanConfig) -> Plan:
    """Measure, run the study forward, and work out what would change it.

    Raises:
        ConfigError: options contradict each other, or the search can't be trained.
        StudyError: the file of curves is none.
    """
    problems, pruner = judge_search(search.hpo, search.steps)
    others = Others()
    enqueued = parse_enqueued(search.hpo.enqueue, search.space)
    points = draw_parameter_sets(search.space, enqueued, POINTS + len(enqueued))
    find = _by_hand if options.step_ms else _measured
    calibration, looks, variants = find(search, options, points)
    problems += [] if options.step_ms else others.problems()
    problems += doubts(calibration)
    priced = Priced.of(calibration, points, search.space, search.usual, len(search.hpo.enqueue))
    study = Study(
        trials=search.hpo.n_trials,
        steps=search.steps,
        pruner=pruner,
        workers=options.workers,
        seeds=search.hpo.n_seed_replicates,
        refit=search.hpo.refit,
        learns=search.hpo.sampler == "tpe",
        patience=search.monitor.patience,
        survival=options.survival,
        curves=None if options.curves is None else Recording.load(Path(options.curves)),
    )
    share = predict(study, priced, calibration, WHAT_IF_RUNS).share[1]
    study = replace(study, compile_s=trying_s(study, priced, calibration, share, search.compile)[0])
    prediction = predict(study, priced, calibration)
    change = Changes(study, priced, calibration, search.data.split.val_fraction, search.hpo.cost is not None)
    late = options.deadline is not None and prediction.high / HOUR > options.deadline
    compile_s = COMPILE_S if options.compile_s is None else options.compile_s
    return Plan(
        search.run_dir.name,
        study,
        prediction,
        calibration,
        tuple(levels(study, priced, calibration, prediction, variants, looks, search.compile, options.compile_gain)),
        tuple(describe_compile(study, priced, calibration, prediction, compile_s, options.compile_gain)),
        tuple(change.usual()),
        tuple(problems),
        tuple(assumed(study, options.step_ms is not None)),
        options.deadline,
        tuple(change.meeting(options.deadline)) if late and options.deadline is not None else (),
        options.price,
    )


# ---------------------------------------------------------------------- what trials take


def _measured(
    search: Search, options: PlanConfig, points: list[dict[str, Any]]
) -> tuple[Calibration, Looks | None, dict[str, float]]:
    """On this machine, with what was given by hand put in its place."""
    search.build({})  # from here on what it reads is known
    since = time.perf_counter()
    search.build({})
    start = search.known.process_s * (1 + ENDS) + search.known.checks * (time.perf_counter() - since)
    near = next((p for p in (search.run_dir, *search.run_dir.absolute().parents) if os.access(p, os.W_OK)), None)
    # on the disk of the study, as checkpoints are written there
    with tempfile.TemporaryDirectory(prefix=".lightning-bge-plan-", dir=near) as folder:
        objective = search.monitor.objective
        bench = Bench(search.build, search.hpo, objective, search.compile, search.encoder, Path(folder))
        found = calibrate(bench, points, search.space, search.usual, options.seconds)
        search.encoder.let_go()
        left = max(0.0, options.seconds - found.took)
        variants = measure_variants(search.build, found.draws[0], bench.looks, left)
    given = {"validation": options.validation_s, "fold": options.fold_s}
    costs = [TrialCost(**{**asdict(d.cost), **{k: v for k, v in given.items() if v is not None}}) for d in found.draws]
    draws = tuple(replace(draw, cost=cost) for draw, cost in zip(found.draws, costs, strict=True))
    start = start if options.start_s is None else options.start_s
    return replace(found, draws=draws, start=start), bench.looks, variants


def _by_hand(
    search: Search, options: PlanConfig, points: list[dict[str, Any]]
) -> tuple[Calibration, Looks | None, dict[str, float]]:
    """For another machine: nothing is measured."""
    assert options.step_ms is not None
    sizes = Sizes.of(search.data)
    train = sizes.steps * options.step_ms / 1000
    # without gradients two of three passes fall away
    validation = train / sizes.train * sizes.validation / 3 if options.validation_s is None else options.validation_s
    fold = 1.0 if options.fold_s is None else options.fold_s
    cost = TrialCost(0.0, fold, 0.0, train, validation, epochs=search.usual)
    step_s = options.step_ms / 1000
    draw = Draw(points[0], features(points[0], search.space), cost, step_s, train / sizes.train, 0.0)
    start = search.known.process_s * (1 + ENDS) if options.start_s is None else options.start_s
    found = Calibration((draw,), start, refit_epoch=train / sizes.train * sizes.all, steps=sizes.steps)
    return found, None, {}
