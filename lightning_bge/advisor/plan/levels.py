"""The hours of a study at each optimization level."""

from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch

from lightning_bge.advisor.plan.config import GivenFigures
from lightning_bge.advisor.plan.cost_model import HOUR, MeasuredTrial, break_even, compile_balance, format_hours
from lightning_bge.advisor.plan.planned_trials import PlannedTrials
from lightning_bge.advisor.plan.predict import Prediction, Scenario, StudyCosts
from lightning_bge.advisor.plan.short_study import InEffect, StepTimer, seconds_of, work_of
from lightning_bge.callbacks.compile.policy import CompileConfig, Findings, probe_time_limit, too_short
from lightning_bge.callbacks.torch_backends import AMPERE, TorchBackends
from lightning_bge.runtime.compat.torch import compute_capability
from lightning_bge.runtime.memory import release

LEAST, MOST, ENOUGH_S = 2, 10, 2.0  # steps to measure of each variant: those of two seconds
MIXED = {"bf16-mixed": "+bf16", "16-mixed": "+fp16"}  # the level of each precision with 16-bit products
ASSUMED_16_BIT = 2.0  # speed-up of 16-bit products where there is no time to measure it
Basis = Literal["measured", "predicted", "in effect", "off", "not available", "unknown"]


class Level(NamedTuple):
    """One row of the table of levels.

    Attributes:
        name: the optimization that is added.
        hours: of the whole study with it and all above it.
        how: the arithmetic that leads there from the row above, or the reason why nothing changes.
        basis: measured, predicted, in effect (its part of the hours is not known), off, not available on this machine,
            or unknown, for another machine.
    """

    name: str
    hours: float
    how: str
    basis: Basis

    def __str__(self) -> str:
        return f"{self.name:<16}  {format_hours(self.hours):>8}  {self.basis:<13}  {self.how}"


class Variants(NamedTuple):
    """Seconds of a unit of work without some optimizations, over the seconds with them; None: not measured.

    Attributes:
        padded: without packing.
        fp32: without packing, 16-bit products and TF32.
    """

    padded: float | None = None
    fp32: float | None = None


def measure_variants(planned: PlannedTrials, trial: MeasuredTrial, in_effect: InEffect, seconds: float) -> Variants:
    """Train a few steps without packing, and a few in fp32 too, if the planned study has both and there is time.

    Args:
        planned: the trials of the study.
        trial: one that was measured.
        in_effect: in that trial.
        seconds: about how long it may take.
    """
    steps = max(LEAST, min(MOST, int(ENOUGH_S / trial.step_s)))
    warmup = steps // 2  # the shapes of padded batches are new for many steps
    found: list[float | None] = []
    padded = planned.without_packing
    for wanted, slower, changes in (
        (in_effect.attention == "packed", 2, padded),
        (in_effect.precision in MIXED, 4, {**padded, "trainer.precision": "32-true"}),
    ):
        likely = trial.step_s * (steps + warmup) * slower
        if not wanted or likely > seconds:
            found.append(None)
            continue
        full = in_effect.device == "cuda" and "trainer.precision" in changes
        callbacks = [TorchBackends(tf32=False)] if full else []
        found.append(_unit_seconds(planned, {**trial.params, **changes}, steps, warmup, callbacks) / trial.unit_s)
        release(host=False)  # trainer and module refer to each other until the garbage collector has run
        seconds -= likely
    return Variants(*found)


def _unit_seconds(
    planned: PlannedTrials, params: dict[str, Any], steps: int, warmup: int, callbacks: list[Any]
) -> float:
    """Seconds of a unit of work in a short training, after a warm-up if the epoch has enough steps."""
    setup, timer = planned.build(params), StepTimer(planned.work)
    setup.begin_fold(0, ())
    limits = {"limit_train_batches": warmup + steps, "limit_val_batches": 0, "max_epochs": 1}
    # the timer last: work of other callbacks at the start of a batch is not a part of the step
    trainer = setup.make_trainer(callbacks=[*callbacks, timer], **limits)
    trainer.fit(setup.model, datamodule=setup.datamodule)
    timed = timer.steps[warmup:] or timer.steps
    return seconds_of(timed) / work_of(timed)


def optimization_levels(
    scenario: Scenario,
    costs: StudyCosts,
    prediction: Prediction,
    variants: Variants,
    in_effect: InEffect | None,
    compile: CompileConfig | None,
) -> list[Level]:
    """The table, from no optimization to the planned study: each row's hours follow from those of the row above.

    Args:
        scenario: the planned study.
        costs: what its parts take.
        prediction: of its hours.
        variants: of `measure_variants`.
        in_effect: what is in effect in its trials; None: unknown, on another machine.
        compile: when layers are compiled; None: they are another project's, which is neither compiled nor packed nor
            kept between trials.
    """
    steps, n_trials = scenario.steps, scenario.n_trials
    epochs = [min(cost.epochs, steps.epochs) for cost in costs.trials]
    computing = [(c.train + c.validation * steps.per_epoch) * n for c, n in zip(costs.trials, epochs, strict=True)]
    compute = fmean(computing) * steps.folds * n_trials / HOUR  # of steps and validations
    hours = prediction.unpruned / HOUR + _reading(scenario, costs)
    found = _compute_levels(compute, hours - compute, variants, in_effect)
    found[0] = found[0]._replace(how=f"{n_trials:,} trials x {format_hours(found[0].hours / n_trials)}")
    if compile is None:
        found.pop()  # packing
    else:
        hours, levels = _encoder_levels(scenario, costs, prediction, compile, hours)
        found += levels
    if scenario.workers > 1:
        hours /= scenario.workers
        found.append(Level("+workers", hours, f"/ {scenario.workers} workers, each on its own device", "predicted"))
    if scenario.pruner.name == "none":
        return [*found, Level("+pruning", hours, "hpo.pruner.name is none", "off")]
    low, _, high = prediction.share
    share = f"{prediction.pruned / prediction.unpruned:.0%} of the cost without pruning ({low:.0%} to {high:.0%})"
    hours = prediction.pruned / scenario.workers / HOUR
    return [*found, Level("+pruning", hours, f"{scenario.pruner.name}: {share}", "predicted")]


def _reading(scenario: Scenario, costs: StudyCosts) -> float:
    """Hours of reading the encoder for each fold."""
    return costs.calibration.read * scenario.steps.folds * scenario.n_trials / HOUR


def _encoder_levels(
    scenario: Scenario, costs: StudyCosts, prediction: Prediction, compile: CompileConfig, hours: float
) -> tuple[float, list[Level]]:
    """Compiling, and the encoder cache; also returns the hours with all of them."""
    always = compile.policy == "always"
    tuned: Basis = "in effect" if always and compile.mode == "max-autotune" else "off"
    text = compile_attempt(scenario, costs, prediction.share[1], compile)[1]
    found = [
        Level("+compile", hours, text, "in effect" if always else "off"),
        Level("+zero_grad(None)", hours, "gradients are freed: included in the rows above", "in effect"),
        Level("+max-autotune", hours, f"compile.policy {compile.policy}, compile.mode {compile.mode}", tuned),
    ]
    reading = _reading(scenario, costs)
    where = f"{scenario.n_trials:,} trials x {scenario.steps.folds} folds"
    text = f"{where} without reading the encoder: {format_hours(reading)} less"
    found.append(Level("+encoder cache", hours - reading, text, "measured" if costs.calibration.took else "predicted"))
    return hours - reading, found


def _compute_levels(compute: float, rest: float, variants: Variants, in_effect: InEffect | None) -> list[Level]:
    """No optimization, 16-bit products, TF32 and packing.

    Args:
        compute: hours of steps and validations with all of them.
        rest: other hours.
        variants: what was measured.
        in_effect: what is in effect.
    """
    if in_effect is None:
        text = "as on the machine of given.step_ms: included in the row above"
        return [Level(name, compute + rest, text, "unknown") for name in ("none", "+bf16", "+TF32", "+packing")]
    mixed, packed = in_effect.precision in MIXED, in_effect.attention == "packed"
    padded = 1.0 if variants.padded is None else variants.padded
    none: tuple[str, Basis] = (f"trainer.precision is {in_effect.precision}", "off")
    tf32: tuple[str, Basis] = ("matrix products that remain in fp32: included in the row above", "in effect")
    packing: tuple[str, Basis] = (f"steps x {1 / padded:.3f}", "measured")
    fp32, precision = padded, none
    basis: Basis = "unknown" if packed and variants.padded is None else "measured"
    if mixed and variants.fp32 is not None:
        fp32, precision, basis = variants.fp32, (f"steps x {padded / variants.fp32:.3f}", "measured"), "measured"
    elif mixed:
        text = f"steps x {1 / ASSUMED_16_BIT:.3f}: not measured, assumed to be twice as fast"
        fp32, precision, basis = padded * ASSUMED_16_BIT, (text, "predicted"), "predicted"
    if compute_capability(torch.device(in_effect.device)) < AMPERE:
        tf32 = (f"needs an NVIDIA GPU of compute capability 8.0; the device is {in_effect.device}", "not available")
    elif not in_effect.tf32:
        tf32 = ("fp32 matrices are multiplied in fp32", "off")
    if not packed:
        packing = (f"attention is {in_effect.attention}", "off")
    elif variants.padded is None:
        packing = ("no time to measure it: included in the rows above", "in effect")
    hours = compute * padded + rest
    return [
        Level("none", compute * fp32 + rest, "", basis),
        Level(MIXED.get(in_effect.precision, "+bf16"), hours, *precision),
        Level("+TF32", hours, *tf32),
        Level("+packing", compute + rest, *packing),
    ]


def compile_attempt(
    scenario: Scenario, costs: StudyCosts, share: float, compile: CompileConfig | None
) -> tuple[float, str]:
    """The most seconds that each worker spends on measuring whether compiling pays off, and the reason.

    Args:
        scenario: the planned study.
        costs: what its parts take.
        share: the part of the cost that pruning leaves.
        compile: when layers are compiled; None: never.
    """
    if compile is None or compile.policy == "never":
        return 0.0, "compile.policy is never"
    if compile.policy == "always":
        return 0.0, "compiled in the measured trials"
    known = Findings(layers=1, graphs=2, step_s=costs.calibration.step_s)
    steps = costs.training(scenario, share) / costs.calibration.step_s
    if (text := too_short(known, steps)) is not None:
        return 0.0, text.removeprefix("compile off: ")
    most = probe_time_limit(known, steps, compile)
    return most, f"measured when the study starts, in at most {most:.0f} s"


def describe_break_even(scenario: Scenario, costs: StudyCosts, share: float, given: GivenFigures) -> str:
    """After how many optimizer steps compiling pays off, and what it saves each worker in the whole study.

    Args:
        scenario: the planned study.
        costs: what its parts take.
        share: the part of the cost that pruning leaves.
        given: seconds of compiling, and the share by which it makes steps shorter.
    """
    compile_s, gain, step_s = given.compile_s, given.compile_gain, costs.calibration.step_s
    train = costs.training(scenario, share)
    even = break_even(compile_s, step_s, gain)
    net = compile_balance(train / HOUR, 1, compile_s, gain, "shorter")
    arithmetic = f"{format_hours(net.saved)} - {format_hours(net.overhead)} = {format_hours(net.net)}"
    return (
        f"break-even of +compile: {compile_s:g} s of compiling pay off after {even:,.0f} optimizer steps if these "
        f"become {gain:.0%} shorter; each worker trains {train / step_s:,.0f} steps: {arithmetic}"
    )
