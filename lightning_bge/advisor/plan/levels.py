"""Hours at each optimisation level: measured where that is cheap, and said to be predicted where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from lightning_bge.advisor.plan.calibrate import Calibration, Draw
from lightning_bge.advisor.plan.cost_model import (
    HOUR,
    Basis,
    How,
    Level,
    break_even,
    compile_balance,
    needed_gain,
    saved,
)
from lightning_bge.advisor.plan.cost_model import hours as in_words
from lightning_bge.advisor.plan.pace import measure_pace
from lightning_bge.advisor.plan.predict import Prediction, Priced, Study
from lightning_bge.advisor.plan.trial_bench import Looks
from lightning_bge.callbacks.compile.policy import CompileConfig, Findings, probe_time_limit, too_short
from lightning_bge.callbacks.torch_backends import TorchBackends
from lightning_bge.hpo.trial.objective import Build

LEAST, MOST, ENOUGH_S = 2, 10, 2.0  # steps to measure of each variation: those of two seconds
CLAIMED_BF16 = 2.0  # "twice as fast", where there is no time to measure it
PLAIN = "bf16 off, padded"
PADDED = "padded"


def measure_variants(build: Build, draw: Draw, looks: Looks, seconds: float) -> dict[str, float]:
    """Seconds of a token without packing, and without bf16 as well, over those now; without those there is no time for.

    Args:
        build: the search's.
        draw: a point that was measured.
        looks: what is in effect.
        seconds: about how long it may take.
    """
    wanted: dict[str, dict[str, Any]] = {}
    if looks.attention == "packed":
        wanted[PADDED] = {"model.attention": "padded"}
    if looks.precision == "bf16-mixed":
        wanted[PLAIN] = {"model.attention": "padded", "trainer.precision": "32-true"}
    found = {}
    for name, settings in wanted.items():
        steps = max(LEAST, min(MOST, int(ENOUGH_S / draw.step_s)))
        warmup = steps // 2  # padded batches come in ever new shapes
        likely = draw.step_s * (steps + warmup) * (2 if name == PADDED else 4)
        if likely <= seconds:
            full = [TorchBackends(tf32=False)] if name == PLAIN and looks.device == "cuda" else []
            pace = measure_pace(build({**draw.params, **settings}), steps, warmup, callbacks=full)
            found[name] = 1 / pace.tokens_per_s / draw.token_s
            seconds -= likely
    return found


def levels(
    study: Study,
    priced: Priced,
    calibration: Calibration,
    prediction: Prediction,
    variants: dict[str, float],
    looks: Looks | None,
    compile: CompileConfig,
    gain: float,
) -> list[Level]:
    """The table, from nothing to what is planned: each row's hours follow from those of the row before.

    Args:
        study: what is planned.
        priced: what its points take.
        calibration: what was measured.
        prediction: of the study.
        variants: of `measure_variants`.
        looks: what is in effect; None: of another machine, where that is not known.
        compile: when layers are compiled.
        gain: share by which compiled steps are taken to be shorter.
    """
    compute = fmean(
        (cost.train + cost.validation * study.steps.per_epoch) * min(cost.epochs, study.steps.epochs)
        for cost in priced.costs
    )
    compute = compute * study.steps.folds * study.trials / HOUR
    rest = prediction.full / HOUR - compute
    reload = calibration.read * study.steps.folds * study.trials / HOUR
    start, basis = _start(variants, looks)
    trial = (compute * start + rest + reload) / study.trials
    found = [Level("none", trial * study.trials, f"{study.trials:,} trials x {in_words(trial)}", basis)]
    if looks is None:
        what = "as it was where the step was timed: within the row above"
        found += [Level(name, found[0].hours, what, "not known") for name in ("+bf16", "+TF32", "+packing")]
    else:
        found += _computing(compute, rest + reload, start, basis, variants, looks)
    tried = trying_s(study, priced, calibration, prediction.share[1], compile)
    found += _compiling(tried, compile, gain, found[-1].hours, compute)
    now = found[-1].hours - reload
    each = f"{study.trials:,} x {study.steps.folds} times not reading the model: {in_words(reload)} less"
    found.append(Level("+warm start", now, each, "measured" if calibration.took else "predicted"))
    if study.workers > 1:
        now /= study.workers
        found.append(Level("+workers", now, f"/ {study.workers}, each on a device of its own", "predicted"))
    low, _, high = prediction.share
    text = f"{prediction.search / prediction.full:.0%} of the full cost ({low:.0%} to {high:.0%})"
    pruned = prediction.search / study.workers / HOUR
    name = study.pruner.name
    if name == "none" and study.survival is None:
        found.append(Level("+pruning", now, "off: hpo.pruner.name is none", "off"))
    else:
        found.append(Level("+pruning", pruned, f"{name}: {text}", "predicted"))
    return found


def _start(variants: dict[str, float], looks: Looks | None) -> tuple[float, Basis]:
    """Seconds of a token with nothing on over those now, and how that is known."""
    if looks is None:
        return 1.0, "not known"
    bf16, packed = looks.precision == "bf16-mixed", looks.attention == "packed"
    if bf16:
        claimed = variants.get(PADDED, 1.0) * CLAIMED_BF16
        return variants.get(PLAIN, claimed), "measured" if PLAIN in variants else "predicted"
    # without a measurement nothing is known of packing
    return variants.get(PADDED, 1.0), "measured" if PADDED in variants or not packed else "not known"


def _computing(
    compute: float, rest: float, start: float, basis: Basis, variants: dict[str, float], looks: Looks
) -> list[Level]:
    """bf16, TF32 and packing; `rest` are the hours outside of steps and validations."""
    found, padded = [], variants.get(PADDED, 1.0)
    if looks.precision == "bf16-mixed":
        what = f"steps x {padded / start:.3f}" + ("" if basis == "measured" else ": twice as fast, as is claimed")
        found.append(Level("+bf16", compute * padded + rest, what, basis))
    else:
        found.append(Level("+bf16", compute * padded + rest, f"off: trainer.precision is {looks.precision}", "off"))
    if looks.device != "cuda":
        tf32 = Level("+TF32", found[-1].hours, f"a format of Nvidia's GPUs; this is {looks.device}", "impossible")
    elif torch.cuda.get_device_capability() < (8, 0):
        tf32 = Level("+TF32", found[-1].hours, "this GPU is older than Ampere", "impossible")
    elif not looks.tf32:
        tf32 = Level("+TF32", found[-1].hours, "off: fp32 matrices are multiplied in fp32", "off")
    else:
        tf32 = Level("+TF32", found[-1].hours, "what remains in fp32: within the row above", "in effect")
    found.append(tf32)
    if looks.attention != "packed":
        found.append(Level("+packing", compute + rest, f"off: attention is {looks.attention}", "off"))
    elif PADDED in variants:
        found.append(Level("+packing", compute + rest, f"steps x {1 / padded:.3f}", "measured"))
    else:
        found.append(Level("+packing", compute + rest, "no time to measure it: within the rows above", "in effect"))
    return found


def training_s(study: Study, priced: Priced, share: float) -> float:
    """Seconds of optimizer steps in each worker's part of the study, of which the pruner leaves this share."""
    trial = study.steps.folds * fmean(cost.train * min(cost.epochs, study.steps.epochs) for cost in priced.costs)
    return study.trials * trial * share / study.workers


def trying_s(
    study: Study, priced: Priced, calibration: Calibration, share: float, compile: CompileConfig
) -> tuple[float, str]:
    """The most seconds that each worker spends on finding out whether compiling pays, and what is known of it now."""
    if compile.policy == "never":
        return 0.0, "compile.policy is never"
    if compile.policy == "always":
        return 0.0, "compiled in what was measured"
    known = Findings(graphs=2, step_s=calibration.step_s)
    steps = training_s(study, priced, share) / calibration.step_s
    if (text := too_short(known, steps)) is not None:
        return 0.0, text.removeprefix("compile off: ")
    most = probe_time_limit(known, steps, compile)
    return most, f"tried when the study starts, for {most:.0f} s at most; what it brings is not known before"


def _compiling(
    tried: tuple[float, str], compile: CompileConfig, gain: float, hours: float, compute: float
) -> list[Level]:
    most, text = tried
    if most:
        text += f"; steps {gain:.0%} shorter would make it {in_words(hours - saved(compute, gain, 'shorter'))}"
    state = "in effect" if compile.policy == "always" else "off"
    found = [Level("+compile", hours, text, state)]  # type: ignore[arg-type]
    found.append(Level("+zero_grad(None)", hours, "gradients are freed: within the rows above", "in effect"))
    tuned = compile.mode == "max-autotune"
    if compile.policy == "always" and tuned:
        found.append(Level("+max-autotune", hours, "within compile", "in effect"))
    else:
        text = "with compile" if tuned else f"compile.mode is {compile.mode}"
        found.append(Level("+max-autotune", hours, text, "off"))
    return found


def describe_compile(
    study: Study, priced: Priced, calibration: Calibration, prediction: Prediction, compile_s: float, gain: float
) -> list[str]:
    """When compiling pays, with the arithmetic; with steps this share shorter, and with steps this share faster."""
    train = training_s(study, priced, prediction.share[1])
    steps = train / calibration.step_s
    needed = needed_gain(compile_s, train)
    pays = f"pay where steps get {needed:.1%} shorter" if needed < 1 else "can't pay"
    lines = [
        f"each worker trains {steps:,.0f} steps of {calibration.step_s * 1000:,.0f} ms = {in_words(train / HOUR)}; "
        f"{compile_s:g} s of compiling {pays}"
    ]
    kinds: Sequence[How] = ("shorter", "faster")
    for how in kinds:
        even = break_even(compile_s, calibration.step_s, gain, how)
        trials = even / max(1.0, study.steps.folds * study.steps.epochs * calibration.steps)
        net = compile_balance(train / HOUR, 1, compile_s, gain, how)
        lines.append(
            f"with steps {gain:.0%} {how} it has paid after {even:,.0f} steps, {trials:,.1f} whole trials; "
            f"net: {in_words(net.saved)} - {in_words(net.overhead)} = {in_words(net.net)}"
        )
    return lines
