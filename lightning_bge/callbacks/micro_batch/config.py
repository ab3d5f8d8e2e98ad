"""The options of the search for a micro-batch size."""

import math
from dataclasses import dataclass

from lightning_bge.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class MemoryConfig:
    """How the size of a micro-batch is found.

    Attributes:
        limit_gb: memory that this process may use on the training device, in units of 2**30 bytes. Unset: what the
            control group, RLIMIT_AS, RLIMIT_DATA or the GPU allow; on a CPU without such a limit nothing is searched.
        safety_margin: share of the activations' memory that is left free. 0.1, as allocators fragment between steps.
        min_speedup: stop where twice the size brings less than this share more tokens a second. null: take as much as
            memory allows.
        default_size: tokens. Speed is not measured below this size, which is also taken where nothing can be searched.
        cache: keep what was found in a file, for other processes and later runs.
    """

    limit_gb: float | None = None
    safety_margin: float = 0.1
    min_speedup: float | None = 0.05
    default_size: int = 8192
    cache: bool = True

    def __post_init__(self) -> None:
        checks = {
            "limit_gb": ("a number above 0, or null", self.limit_gb is None or 0 < self.limit_gb < math.inf),
            "safety_margin": ("0 to below 1", 0 <= self.safety_margin < 1),
            "min_speedup": ("0 or more, or null", self.min_speedup is None or 0 <= self.min_speedup < math.inf),
            "default_size": ("1 token or more", self.default_size >= 1),
        }
        for name, (expected, good) in checks.items():
            if not good:
                raise ConfigError(f"memory.{name}: expected {expected}, got {getattr(self, name)}")

    @property
    def limit_bytes(self) -> int | None:
        """`limit_gb` in bytes."""
        return None if self.limit_gb is None else round(self.limit_gb * GIB)
