"""What an optimisation brings: steps with it and without it, in turns, on the same batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from time import monotonic, perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from scipy.stats import t as student
from torch import nn

from lightning_bge.advisor.audit.checks_compute import Gain
from lightning_bge.advisor.audit.observe import WARM_UP, Watch
from lightning_bge.runtime.clock import wait_for

# settings by their dotted names, callbacks, the trainer's limits -> the module and its trainer, when they have trained
Run = Callable[[dict[str, Any], Sequence[Callback], dict[str, Any]], tuple[LightningModule, Trainer]]

BATCHES = 3  # that are timed in each round, after the warm-up
MOST_PARAMETERS = 2**24  # of a copy on which optimizers are compared


@dataclass(frozen=True)
class Variation:
    """Something that can be switched.

    Attributes:
        row: which row of the audit it belongs to.
        settings: that switch it to the other side.
        on: whether it is on as the run is configured, so that `settings` switch it off.
        text: what is compared, in words.
        yaml: the line that switches it on.
    """

    row: str
    settings: dict[str, Any]
    on: bool
    text: str
    yaml: str = ""


@dataclass
class Measured:
    """Seconds of a batch, of the same ones in each round, as configured and with each variation.

    Attributes:
        base: as configured.
        others: by the variation's row.
        skipped: rows without a gain -> why.
    """

    base: list[float] = field(default_factory=list)
    others: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def rounds(self, row: str) -> list[tuple[float, float]]:
        """As configured and with the variation, of the rounds in which both could be timed."""
        return [pair for pair in zip(self.base, self.others[row], strict=True) if math.isfinite(sum(pair))]


def measure_variations(
    run: Run,
    variations: Sequence[Variation],
    rounds: int,
    seconds: float,
    epoch: int = WARM_UP + BATCHES + 1,
    fixed: dict[str, Any] | None = None,
) -> Measured:
    """Train a few batches as configured and with each variation, in turns, so that all see the same machine.

    Args:
        run: trains afresh, each time from the same weights on the same batches.
        variations: one change each.
        rounds: of all of them.
        seconds: begin no further round after so many; what has fewer than two rounds then counts as skipped. So does a
            variation that can't be trained.
        epoch: batches that an epoch has at least. Of one of a single batch nothing can be timed.
        fixed: settings of all, where a variation does not change them.
    """
    if epoch < 2:
        return Measured(skipped=dict.fromkeys([variation.row for variation in variations], "an epoch has one batch"))
    found, until = Measured(others={variation.row: [] for variation in variations}), monotonic() + seconds
    batches = min(epoch, WARM_UP + BATCHES + 1)
    limits = {"limit_train_batches": batches, "max_epochs": math.ceil((WARM_UP + BATCHES) / (batches - 1))}
    for number in range(rounds):
        began = monotonic()
        sides: list[Variation | None] = [None, *variations]
        for side in sides if number % 2 == 0 else reversed(sides):  # so that a machine that slows down favours none
            if side is None:
                found.base.append(_time(run, fixed or {}, limits))
            elif side.row not in found.skipped:
                try:
                    found.others[side.row].append(_time(run, {**(fixed or {}), **side.settings}, limits))
                except Exception as error:  # whatever stands against the other side: the row says so
                    found.skipped[side.row] = f"the other side can't be trained: {type(error).__name__}: {error}"
        if number + 1 < rounds and monotonic() + (monotonic() - began) > until:
            break
    for row in found.others:
        if row not in found.skipped and len(found.rounds(row)) < 2:
            found.skipped[row] = "fewer than two rounds could be timed, for want of time or as a compiler was at work"
    return found


def _time(run: Run, settings: dict[str, Any], limits: dict[str, Any]) -> float:
    """Mean seconds of a batch; NaN: none could be timed."""
    watch = Watch(trace=False)
    run(settings, [watch], limits)
    timed = watch.observation.timed[:BATCHES]
    return fmean(cycle.seconds for cycle in timed) if timed else math.nan


def gain_of(variation: Variation, measured: Measured) -> Gain | None:
    """The share of a step's time that being on saves; None: it was not measured."""
    if variation.row in measured.skipped or variation.row not in measured.others:
        return None
    base, other = zip(*measured.rounds(variation.row), strict=True)
    on, off = (base, other) if variation.on else (other, base)
    low, mid, high = interval([math.log(a / b) for a, b in zip(on, off, strict=True)])
    return Gain(
        1 - math.exp(high),
        1 - math.exp(mid),
        1 - math.exp(low),
        "measured",
        f"{variation.text}: {fmean(on) * 1e3:.0f} ms a batch against {fmean(off) * 1e3:.0f} ms, "
        f"{len(on)} rounds in turns",
    )


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Student's interval of the mean of two values or more: its lower end, the mean, its upper end."""
    center = fmean(values)
    half = float(student.ppf((1 + level) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return center - half, center, center + half


# ---------------------------------------------------------------------- what a copy of the weights can tell


def optimizer_gains(module: nn.Module, device: torch.device, step_s: float, rounds: int) -> dict[str, Gain]:
    """What AdamW's fused kernel, and `set_to_none`, save of a step: measured on a copy of the weights.

    Args:
        module: whose parameters' shapes count; of large models a part of them, scaled up.
        device: where.
        step_s: seconds of a step, which the seconds found are shares of.
        rounds: in turns; of fewer than two nothing is said.
    """
    if rounds < 2:
        return {}
    shapes = [tuple(p.shape) for p in module.parameters() if p.requires_grad]
    total = sum(math.prod(shape) for shape in shapes)
    kept: list[tuple[int, ...]] = []
    while shapes and (not kept or sum(map(math.prod, kept)) + math.prod(shapes[0]) <= MOST_PARAMETERS):
        kept.append(shapes.pop(0))
    if not kept:
        return {}
    scale = total / sum(map(math.prod, kept))
    sides = {kind: _Side(kept, device, **options) for kind, options in _KINDS.items()}
    spent: dict[str, list[float]] = {name: [] for name in (*sides, "zeros", "none")}
    for _ in range(rounds):
        for kind, side in sides.items():
            spent[kind].append(side.step() * scale)
        spent["zeros"].append(sides["fused"].zeros() * scale)
        spent["none"].append(sides["fused"].none() * scale)
    return {
        "fused optimizer": _share(spent["fused"], spent["foreach"], step_s, "AdamW fused against foreach"),
        "zero_grad(set_to_none=True)": _share(
            spent["none"], spent["zeros"], step_s, "gradients freed and set against filled with zeros and added to"
        ),
    }


_KINDS: dict[str, dict[str, Any]] = {"fused": {"fused": True}, "foreach": {"foreach": True}}


class _Side:
    def __init__(self, shapes: Sequence[tuple[int, ...]], device: torch.device, **options: Any) -> None:
        self.device = device
        self.parameters = [nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
        self.new = [torch.full_like(p, 1e-3) for p in self.parameters]
        self.kept = [torch.full_like(p, 1e-3) for p in self.parameters]
        for parameter, gradient in zip(self.parameters, self.kept, strict=True):
            parameter.grad = gradient
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, **options)
        self.optimizer.step()

    def step(self) -> float:
        """Seconds of a step."""
        return self._timed(self.optimizer.step)

    def zeros(self) -> float:
        """Seconds of filling the gradients with zeros and adding new ones."""

        def both() -> None:
            torch._foreach_zero_(self.kept)
            for grad, new in zip(self.kept, self.new, strict=True):
                grad.add_(new)

        return self._timed(both)

    def none(self) -> float:
        """Seconds of dropping the gradients and taking new ones."""

        def both() -> None:
            for parameter in self.parameters:
                parameter.grad = None
            for parameter, new in zip(self.parameters, self.new, strict=True):
                parameter.grad = new

        return self._timed(both)

    def _timed(self, call: Callable[[], Any]) -> float:
        call()
        wait_for(self.device)
        since = perf_counter()
        call()
        wait_for(self.device)
        return perf_counter() - since


def _share(on: list[float], off: list[float], step_s: float, text: str) -> Gain:
    low, mid, high = interval([(b - a) / step_s for a, b in zip(on, off, strict=True)])
    words = f"{text}: {fmean(on) * 1e3:.1f} ms against {fmean(off) * 1e3:.1f} ms, of {step_s * 1e3:.0f} ms a step"
    return Gain(low, mid, high, "measured", words)
