"""The options of an audit."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_bge.errors import ConfigError

AUDIT_SCHEMA = 2  # schema version of `audit.json`


@dataclass(frozen=True)
class AuditConfig:
    """How much an audit measures.

    Attributes:
        rounds: how often each option is measured, in turns with the others. 0: nothing is switched on and off, and only
            what can be observed is reported. 5, as the interval of fewer is wide.
        time_limit: seconds after which no further round begins.
        compile_time_limit: seconds for compiling one layer, to predict what torch.compile saves; 0: do not try.
        json: a file where the audit is written as JSON too.

    Raises:
        ConfigError: a value is below 0.
    """

    rounds: int = 5
    time_limit: float = 90.0
    compile_time_limit: float = 30.0
    json: str | None = None

    def __post_init__(self) -> None:
        for name in ("rounds", "time_limit", "compile_time_limit"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")
