"""Whether compiling an encoder's layers pays: the settings, what is known, and the arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from lightning_bge.callbacks.compile.probe import Measured
from lightning_bge.errors import ConfigError

Policy = Literal["auto", "always", "never"]
Mode = Literal["default", "reduce-overhead", "max-autotune"]

MOST_GAIN = 0.5  # of a step: more than a step twice as fast is not expected of layers that matrix products dominate
LEAST_COMPILE_S = 2.0  # one graph; 4.3 s was the least measured, on a CPU core with a warm inductor cache
LEAST_TRY_S = 8.0  # a whole try, torch's compiler imported first: measured with a warm inductor cache
MOST_TRYING = 0.02  # of the time that is left may be spent on trying: where it ends in "off", it must not be felt
MARGIN = 1.5  # what compiling saves must be so many times what it costs, as both are estimates


@dataclass(frozen=True)
class CompileConfig:
    """When and how the encoder's layers are compiled.

    Attributes:
        policy: auto measures on the real model whether compiling pays over the steps that are left, and says why;
            always compiles when training starts; never leaves them as they are.
        mode: torch.compile's. reduce-overhead records CUDA graphs, which want static shapes: pad micro-batches to few
            token totals, as each one is compiled anew.
        time_limit: the most seconds that auto spends on trying. 120, as one layer of MiniLM took 17 to 50 s on a CPU.
        backend: torch.compile's.
    """

    policy: Policy = "auto"
    mode: Mode = "default"
    time_limit: float = 120.0
    backend: str = "inductor"

    def __post_init__(self) -> None:
        for name, allowed in (("policy", get_args(Policy)), ("mode", get_args(Mode))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"compile.{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)}")
        if not 0 < self.time_limit < math.inf:
            raise ConfigError(
                f"compile.time_limit: expected seconds above 0, got {self.time_limit}: to try nothing, set policy never"
            )


@dataclass
class Findings:
    """What this process knows of one kind of layers on one device; it outlives the callback, so one trial pays for all.

    Attributes:
        graphs: graphs that the layers need: one to train and one to evaluate, for each different layer.
        step_s: seconds of an optimizer step with eager layers; None: not timed yet.
        batches: Lightning batches in an optimizer step.
        measured: what the probe measured, or None.
        failed: why it measured nothing.
        tried_s: the longest that the probe was given.
        decided: why compiling was decided on; what it costs is paid then, so that it stays. None: it was not.
        warm: loops whose graphs are there; what is compiled in them from then on is a recompilation.
    """

    graphs: int
    step_s: float | None = None
    batches: float = 1.0
    measured: Measured | None = None
    failed: str | None = None
    tried_s: float = 0.0
    decided: str | None = None
    warm: set[str] = field(default_factory=set)

    def saved_s(self, layers: int) -> float:
        """Seconds saved in an optimizer step by compiling so many layers."""
        assert self.measured is not None
        return layers * self.batches * (self.measured.eager_s - self.measured.compiled_s)


def too_short(found: Findings, steps: float) -> str | None:
    """Why it can't pay to try over so many steps; None: it could."""
    assert found.step_s is not None
    left, least = steps * found.step_s, LEAST_COMPILE_S * found.graphs
    if left * MOST_GAIN < least * MARGIN:
        return (
            f"compile off: {count(steps)} steps left x at most {MOST_GAIN:.2f} of {span(found.step_s)} a step = "
            f"{span(left * MOST_GAIN)} could be saved, compiling takes at least {span(least)}"
        )
    if left * MOST_TRYING < LEAST_TRY_S:
        return (
            f"compile off: {count(steps)} steps left x {span(found.step_s)} a step = {span(left)}; to try it takes at "
            f"least {span(LEAST_TRY_S)}, more than {MOST_TRYING:.0%} of that"
        )
    return None


def time_limit_s(found: Findings, steps: float, config: CompileConfig) -> float:
    """How long the probe may take: as configured, and no more than a small share of the time that is left."""
    assert found.step_s is not None
    return min(config.time_limit, MOST_TRYING * steps * found.step_s)


def judge(found: Findings, layers: int, steps: float) -> tuple[bool, str]:
    """Whether to compile so many layers for so many optimizer steps, and the arithmetic in one line."""
    assert found.measured is not None
    saved, cost = found.saved_s(layers), found.graphs * found.measured.compile_s
    if saved <= 0:
        times = f"{span(found.measured.compiled_s)} compiled, {span(found.measured.eager_s)} eager"
        return False, f"compile off: a layer's part of a batch takes {times}: nothing to save"
    even = cost / saved
    text = f"{span(cost)} to compile {found.graphs} graphs, {span(saved)} saved a step, breaks even after {count(even)}"
    if steps < MARGIN * even:
        return False, f"compile off: {text} steps, wanted within {count(steps / MARGIN)} of {count(steps)} steps left"
    return True, f"compile on: {text} of {count(steps)} steps left: saves {span(steps * saved - cost)}"


def count(number: float) -> str:
    """A number of steps in words: `190,000`."""
    return "unlimited" if math.isinf(number) else f"{number:,.0f}"


def span(seconds: float) -> str:
    """A time in words: `31 ms`, `15 s`, `37 min`."""
    if math.isinf(seconds):
        return "unlimited time"
    for unit, size, least in (("h", 3600, 7200), ("min", 60, 180), ("s", 1, 1)):
        if seconds >= least:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1000:.3g} ms"
