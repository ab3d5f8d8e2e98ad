"""The options of batching and loading."""

import multiprocessing
from dataclasses import dataclass
from typing import Literal

from lightning_bge.errors import ConfigError

AUTO_MAX_TOKENS = 8192  # what `auto` starts with
EVAL_FACTOR = 2  # without gradients few activations are kept


@dataclass(frozen=True)
class BatchingConfig:
    """How rows become batches.

    Args:
        max_tokens: maximum number of tokens of a training micro-batch, without padding. It changes memory and speed,
            not the result. auto: found by `MicroBatchFinder`, 8192 until then; running out of memory lowers it.
        eval_max_tokens: maximum number of tokens of a micro-batch without gradients. auto: twice max_tokens.
        balanced: draw every class with equal probability, with replacement.
        seed: seed of the order of training rows, separate from the other seeds so that trials are compared in pairs.
        num_workers: processes that assemble batches. 0, the training process, is the fastest for tokenized rows in
            memory: assembling a batch of 32 rows takes less than 0.1 ms, receiving it from a worker about 2 ms.
        pin_memory: copy batches into page-locked memory. Unset: where CUDA is available.
        persistent_workers: keep the worker processes between epochs; no effect with 0 workers.
        multiprocessing_context: how processes start. Unset: forkserver where the platform has it, else spawn; a fork of
            a process that runs threads may hang.
    """

    max_tokens: int | Literal["auto"] = "auto"
    eval_max_tokens: int | Literal["auto"] = "auto"
    balanced: bool = False
    seed: int = 42
    num_workers: int = 0
    pin_memory: bool | None = None
    persistent_workers: bool = True
    multiprocessing_context: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("num_workers", 0), ("max_tokens", 1), ("eval_max_tokens", 1)):
            value = getattr(self, name)
            if name.endswith("max_tokens") and value == "auto":
                continue
            if type(value) is not int or value < least:
                auto = "auto or " if name.endswith("max_tokens") else ""
                raise ConfigError(f"data.batching.{name} must be {auto}a whole number from {least} up, got {value!r}")
        known = multiprocessing.get_all_start_methods()
        if self.multiprocessing_context not in (None, *known):
            raise ConfigError(
                f"data.batching.multiprocessing_context must be unset or one of {', '.join(known)}, "
                f"got {self.multiprocessing_context!r}"
            )

    @property
    def initial_max_tokens(self) -> int:
        """The most tokens of a training micro-batch before anything changes it."""
        return AUTO_MAX_TOKENS if self.max_tokens == "auto" else self.max_tokens

    def eval_limit(self, max_tokens: int) -> int:
        """The most tokens of a micro-batch without gradients, where training micro-batches have up to `max_tokens`."""
        return EVAL_FACTOR * max_tokens if self.eval_max_tokens == "auto" else self.eval_max_tokens
