"""Measures what an optimization saves: the same batches trained with it on and off, in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from time import monotonic, perf_counter
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from scipy.stats import t as student
from torch import nn

from lightning_bge.advisor.audit.checks.row import TimeSaved
from lightning_bge.advisor.audit.observation import WARM_UP
from lightning_bge.advisor.audit.observe import StepObserver
from lightning_bge.runtime.clock import wait_for

# Trains with changed options (by their dotted names), an observer, and arguments of the trainer that limit it.
Run = Callable[[dict[str, Any], StepObserver, dict[str, Any]], tuple[LightningModule, Trainer]]

BATCHES = 3  # timed in each round, after the warm-up
MAX_PARAMETERS = 2**24  # of the copy on which optimizers are compared


@dataclass(frozen=True)
class Ablation:
    """An optimization that can be switched by an option.

    Attributes:
        row: name of its row in the audit.
        options: by their dotted names, which switch it to the other side.
        on: whether it is on as the run is configured, so that `options` switch it off.
        text: what is compared.
        yaml: the line that switches it on.
    """

    row: str
    options: dict[str, Any]
    on: bool
    text: str
    yaml: str = ""


@dataclass
class Timings:
    """Seconds of a batch in each round.

    Attributes:
        configured: as the run is configured.
        switched: with each ablation, by its row.
        skipped: rows that could not be measured -> why.
    """

    configured: list[float] = field(default_factory=list)
    switched: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def rounds(self, row: str) -> list[tuple[float, float]]:
        """As configured and switched, of the rounds in which both could be timed."""
        pairs = zip(self.configured, self.switched[row], strict=True)
        return [pair for pair in pairs if math.isfinite(sum(pair))]


def measure_ablations(
    run: Run,
    ablations: Sequence[Ablation],
    *,
    rounds: int,
    time_limit: float,
    epoch: int = WARM_UP + BATCHES + 1,
    fixed: dict[str, Any] | None = None,
) -> Timings:
    """Train a few batches as configured and with each ablation, in turns, so that all see the same machine.

    Args:
        run: trains a fresh copy, each time from the same weights on the same batches.
        ablations: one change each.
        rounds: of all of them.
        time_limit: seconds after which no further round begins. What has fewer than two rounds by then is skipped, and
            so is an ablation that fails.
        epoch: batches in an epoch. One of a single batch cannot be timed.
        fixed: options of all runs, unless an ablation changes them.
    """
    if epoch < 2:
        return Timings(skipped=dict.fromkeys([ablation.row for ablation in ablations], "an epoch has one batch"))
    found, until = Timings(switched={ablation.row: [] for ablation in ablations}), monotonic() + time_limit
    batches = min(epoch, WARM_UP + BATCHES + 1)
    limits = {"limit_train_batches": batches, "max_epochs": math.ceil((WARM_UP + BATCHES) / (batches - 1))}
    for number in range(rounds):
        began = monotonic()
        sides: list[Ablation | None] = [None, *ablations]
        for side in sides if number % 2 == 0 else reversed(sides):  # a machine that slows down favors no side
            if side is None:
                found.configured.append(_time(run, fixed or {}, limits))
            elif side.row not in found.skipped:
                try:
                    found.switched[side.row].append(_time(run, {**(fixed or {}), **side.options}, limits))
                except Exception as error:  # any failure of the other side: the row states it
                    found.skipped[side.row] = f"the other side cannot be trained: {type(error).__name__}: {error}"
        if number + 1 < rounds and monotonic() + (monotonic() - began) > until:
            break
    for row in found.switched:
        if row not in found.skipped and len(found.rounds(row)) < 2:
            found.skipped[row] = "fewer than two rounds could be timed within the time limit and without compilation"
    return found


def _time(run: Run, options: dict[str, Any], limits: dict[str, Any]) -> float:
    """Mean seconds of a batch; NaN: none could be timed."""
    observer = StepObserver(trace=False)
    run(options, observer, limits)
    timed = observer.observation.timed[:BATCHES]
    return fmean(cycle.seconds for cycle in timed) if timed else math.nan


def time_saved(ablation: Ablation, timings: Timings) -> TimeSaved | None:
    """The share of a step's time that the optimization saves where it is on; None: it was not measured."""
    if ablation.row in timings.skipped or ablation.row not in timings.switched:
        return None
    configured, switched = zip(*timings.rounds(ablation.row), strict=True)
    on, off = (configured, switched) if ablation.on else (switched, configured)
    low, mid, high = confidence_interval([math.log(a / b) for a, b in zip(on, off, strict=True)])
    text = f"{ablation.text}: {fmean(on) * 1e3:.0f} ms a batch against {fmean(off) * 1e3:.0f} ms, {len(on)} rounds"
    return TimeSaved(1 - math.exp(high), 1 - math.exp(mid), 1 - math.exp(low), "measured", text)


def confidence_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Student's interval of the mean of two values or more: its lower end, the mean, its upper end."""
    center = fmean(values)
    half = float(student.ppf((1 + level) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return center - half, center, center + half


# ---------------------------------------------------------------------- the optimizer, on a copy of the weights


def optimizer_saving(module: nn.Module, device: torch.device, step_s: float, rounds: int) -> TimeSaved | None:
    """What AdamW's fused kernel saves of a step against the foreach one, measured on a copy of the weights.

    Args:
        module: whose parameters' shapes are taken; of large models a part of them, and the seconds are scaled up.
        device: where the copy is.
        step_s: seconds of a step, which the saving is a share of.
        rounds: in turns; with fewer than two there is no result.

    Returns:
        None: there are too few rounds, or no parameters.
    """
    shapes = [tuple(p.shape) for p in module.parameters() if p.requires_grad]
    total = sum(math.prod(shape) for shape in shapes)
    kept: list[tuple[int, ...]] = []
    while shapes and (not kept or sum(map(math.prod, kept)) + math.prod(shapes[0]) <= MAX_PARAMETERS):
        kept.append(shapes.pop(0))
    if rounds < 2 or not kept:
        return None
    scale = total / sum(map(math.prod, kept))
    fused, foreach = _adamw(kept, device, fused=True), _adamw(kept, device, foreach=True)
    pairs = [(_seconds(fused, device) * scale, _seconds(foreach, device) * scale) for _ in range(rounds)]
    low, mid, high = confidence_interval([(off - on) / step_s for on, off in pairs])
    on, off = (fmean(side) * 1e3 for side in zip(*pairs, strict=True))
    text = f"AdamW with fused=True against foreach: {on:.1f} ms against {off:.1f} ms, of {step_s * 1e3:.0f} ms a step"
    return TimeSaved(low, mid, high, "measured", text)


def _adamw(shapes: Sequence[tuple[int, ...]], device: torch.device, **options: Any) -> torch.optim.Optimizer:
    """AdamW over parameters of the given shapes, with gradients and with its state."""
    parameters = [nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, **options)
    optimizer.step()
    return optimizer


def _seconds(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """Seconds of the second of two steps."""
    optimizer.step()
    wait_for(device)
    since = perf_counter()
    optimizer.step()
    wait_for(device)
    return perf_counter() - since
