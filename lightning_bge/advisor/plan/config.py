"""The options of a plan."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_bge.errors import ConfigError

Rule = tuple[str, Callable[[float], bool]]
POSITIVE: Rule = ("above 0", lambda value: value > 0)
NOT_NEGATIVE: Rule = ("0 or more", lambda value: value >= 0)


def _check(config: Any, prefix: str, rules: dict[str, Rule]) -> None:
    """Raise `ConfigError` for the first value that is a number and breaks its rule."""
    for name, (expected, valid) in rules.items():
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and valid(value)):
            raise ConfigError(f"{prefix}{name}: expected a number {expected}, or null, got {value}")


@dataclass(frozen=True)
class GivenFigures:
    """Figures that are given instead of measured, simulated or assumed.

    Attributes:
        step_ms: milliseconds of an optimizer step on another machine; nothing is measured then, a validation takes a
            third of the seconds of training on as many tokens, as two of its three passes are missing, and a fold 1 s
            to start and end. null: measured.
        start_s: seconds from the start of a process to its first trial, and of its end. null: as this process.
        compile_s: seconds of compiling. 60, if nothing else is known.
        compile_gain: share by which compiled steps are shorter. 0.15, in the middle of what is expected of
            torch.compile; `audit` measures it.

    Raises:
        ConfigError: a value is out of range.
    """

    step_ms: float | None = None
    start_s: float | None = None
    compile_s: float = 60.0
    compile_gain: float = 0.15

    def __post_init__(self) -> None:
        seconds = dict.fromkeys(("start_s", "compile_s"), NOT_NEGATIVE)
        gain: Rule = ("from 0 to below 1", lambda value: 0 <= value < 1)
        _check(self, "given.", {"step_ms": POSITIVE, **seconds, "compile_gain": gain})


@dataclass(frozen=True)
class PlanConfig:
    """The plan.

    Attributes:
        workers: processes that share the study, each on its own device.
        seconds: about how long to measure: trials of the study, shortened, on this machine. 60, which is enough for
            steps of a second.
        deadline: hours within which the study has to end; if it takes longer, the plan lists changes that meet it.
        given: figures that are not measured.
        json: file to write the plan to.

    Raises:
        ConfigError: a value is out of range.
    """

    workers: int = 1
    seconds: float = 60.0
    deadline: float | None = None
    given: GivenFigures = GivenFigures()
    json: str | None = None

    def __post_init__(self) -> None:
        _check(self, "", dict.fromkeys(("workers", "seconds", "deadline"), POSITIVE))
