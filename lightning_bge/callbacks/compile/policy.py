"""Whether compiling an encoder's layers pays: the options, what was measured, and the arithmetic."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_bge.callbacks.compile.probe import Measured
from lightning_bge.errors import ConfigError

Policy = Literal["auto", "always", "never"]
Mode = Literal["default", "reduce-overhead", "max-autotune"]

MAX_GAIN = 0.5  # of a step: layers that matrix products dominate do not become more than twice as fast
MIN_COMPILE_S = 2.0  # one graph; 4.3 s was the least measured, on a CPU core with a warm inductor cache
MIN_PROBE_S = 8.0  # a whole measurement, the import of torch's compiler included, with a warm inductor cache
MAX_PROBE_SHARE = 0.02  # of the time that is left: a measurement that ends in "off" must cost little
SAFETY_FACTOR = 1.5  # compiling must save this many times what it costs, as both are estimates


@dataclass(frozen=True)
class CompileConfig:
    """When and how the encoder's layers are compiled.

    Attributes:
        policy: auto measures on the real model whether compiling pays over the steps that are left, and logs why;
            always compiles when training starts; never leaves them eager.
        mode: mode of torch.compile. reduce-overhead records a CUDA graph for each shape: the token totals of packed
            micro-batches are then rounded up to multiples of 1,024 with dummy sequences, which changes no result.
        time_limit: maximum seconds for the measurement of auto. 120, because one layer of MiniLM took 17 to 50 s on a
            CPU.
        backend: back end of torch.compile.
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
                f"compile.time_limit: expected seconds above 0, got {self.time_limit}; policy: never measures nothing"
            )


@dataclass
class Findings:
    """What this process knows of one kind of layers on one device; it outlives the callback, so one trial pays for all.

    Attributes:
        layers: their number.
        graphs: graphs that the layers need: one to train and one to evaluate, for each different layer.
        step_s: seconds of an optimizer step with eager layers; None: not timed yet.
        batches: Lightning batches in an optimizer step.
        measured: what the probe measured, or None.
        failed: why the probe measured nothing; it is not repeated.
        decided: why compiling was decided on; its cost is paid then, so that it stays on. None: it was not.
    """

    layers: int
    graphs: int
    step_s: float | None = None
    batches: float = 1.0
    measured: Measured | None = None
    failed: str | None = None
    decided: str | None = None

    @property
    def saved_s(self) -> float:
        """Seconds saved in an optimizer step by compiling all layers; 0 where nothing was measured."""
        if self.measured is None:
            return 0.0
        return self.layers * self.batches * (self.measured.eager_s - self.measured.compiled_s)


def too_short(found: Findings, steps: float) -> str | None:
    """Why a measurement can't pay over so many steps; None: it could."""
    assert found.step_s is not None
    left, cost = steps * found.step_s, MIN_COMPILE_S * found.graphs
    begin = f"compile off: {format_steps(steps)} steps left x"
    step, most = format_seconds(found.step_s), format_seconds(left * MAX_GAIN)
    if left * MAX_GAIN < cost * SAFETY_FACTOR:
        return (
            f"{begin} at most {MAX_GAIN:.2f} of {step} a step = {most} could be saved, compiling takes at least "
            f"{format_seconds(cost)}"
        )
    if left * MAX_PROBE_SHARE < MIN_PROBE_S:
        return (
            f"{begin} {step} a step = {format_seconds(left)}; to measure it takes at least "
            f"{format_seconds(MIN_PROBE_S)}, more than {MAX_PROBE_SHARE:.0%} of that"
        )
    return None


def probe_time_limit(found: Findings, steps: float, config: CompileConfig) -> float:
    """Seconds that the probe may take: as configured, and no more than a small share of the time that is left."""
    assert found.step_s is not None
    return min(config.time_limit, MAX_PROBE_SHARE * steps * found.step_s)


def decide(found: Findings, steps: float) -> tuple[bool, str]:
    """Whether to compile the layers for so many optimizer steps, and the arithmetic in one line."""
    assert found.measured is not None
    saved, cost = found.saved_s, found.graphs * found.measured.compile_s
    if saved <= 0:
        times = f"{format_seconds(found.measured.compiled_s)} compiled, {format_seconds(found.measured.eager_s)} eager"
        return False, f"compile off: a layer's part of a batch takes {times}: nothing to save"
    even, left = cost / saved, format_steps(steps)
    text = (
        f"{format_seconds(cost)} to compile {found.graphs} graphs, {format_seconds(saved)} saved a step, breaks even "
        f"after {format_steps(even)}"
    )
    if steps < SAFETY_FACTOR * even:
        return (
            False,
            f"compile off: {text} steps, needed within {format_steps(steps / SAFETY_FACTOR)} of {left} steps left",
        )
    return True, f"compile on: {text} of {left} steps left: saves {format_seconds(steps * saved - cost)}"


def format_steps(number: float) -> str:
    """A number of steps: `190,000`, or `unlimited`."""
    return "unlimited" if math.isinf(number) else f"{number:,.0f}"


def format_seconds(seconds: float) -> str:
    """A time with its unit: `31 ms`, `15 s`, `37 min`."""
    if math.isinf(seconds):
        return "unlimited time"
    for unit, size, least in (("h", 3600, 7200), ("min", 60, 180), ("s", 1, 1)):
        if seconds >= least:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1000:.3g} ms"
