"""One process for each device: the strategy, and how such a run ends when one of its processes fails."""

import logging
import time
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from lightning_bge.errors import ConfigError
from lightning_bge.runtime.compat.lightning import kill_ranks, rank_processes, sync_module_states
from lightning_bge.runtime.compat.torch import compare_and_set

log = logging.getLogger(__name__)

Decision = TypeVar("Decision")
MOST_WAITING_S = 5
_FAILED = "lightning_bge/failed"


class UnwrappedDDP(DDPStrategy):
    """DDP for a module that adds up its gradients by itself, as `BGEClassifier` does.

    All ranks start from rank 0's weights. The module is not wrapped into a `DistributedDataParallel`, whose buckets are
    a second copy of all gradients.
    """

    def configure_ddp(self) -> None:
        """Give all ranks rank 0's parameters and buffers."""
        assert self.model is not None
        sync_module_states(self.model)


def choose_strategy(
    strategy: str | Strategy, devices: int | list[int] | str, num_nodes: int, accelerator: Any
) -> str | Strategy:
    """`UnwrappedDDP` for several devices or nodes; a strategy object for one device, or for DDP, is returned unchanged.

    Raises:
        ConfigError: the strategy is another one.
    """
    if isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        return strategy
    if strategy not in ("auto", "ddp"):
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        raise ConfigError(
            f"trainer.strategy: expected auto or ddp, got {name}: the module adds up gradients by itself and needs the "
            "whole weights on each device; leave trainer.strategy out"
        )
    return UnwrappedDDP() if strategy == "ddp" or num_nodes > 1 or _count(devices, accelerator) > 1 else "auto"


def _count(devices: int | list[int] | str, accelerator: Any) -> int:
    """The number of devices that Lightning will make of the setting."""
    if isinstance(devices, list | tuple):
        return len(devices)
    if devices in ("auto", -1, "-1"):
        return torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 1
    if isinstance(devices, str) and "," in devices:
        return len([index for index in devices.split(",") if index.strip()])
    try:
        return int(devices)
    except (TypeError, ValueError):
        raise ConfigError(f"trainer.devices: expected a number of devices, or their indices, got {devices!r}") from None


def as_the_first_decides(value: Decision) -> Decision:
    """The value that the first process has; in a run of one process the value itself."""
    if not dist.is_available() or not dist.is_initialized():
        return value
    found = [value]
    dist.broadcast_object_list(found, src=0)
    return found[0]


class AnotherRankFailed(Exception):
    """Another rank failed before this one, and reports the reason.

    Attributes:
        status: its exit status.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"another rank failed with status {status}")
        self.status = status


def end_ranks(trainer: Trainer, status: int) -> None:
    """Call it where this rank fails: one rank alone reports the reason, and none waits for it.

    The first one to fail leaves a note for the others, which mostly fail in turn because it does not answer any more.
    Rank 0 ends the processes that it started. Where it is not the first, it notices the broken connection, or is ended
    by Lightning, which checks its processes every 5 s.

    Args:
        trainer: whose launcher started the ranks.
        status: the exit status that this rank is about to have.

    Raises:
        AnotherRankFailed: this rank is not the first.
    """
    earlier = _status_of_earlier(status)
    processes = rank_processes(trainer)
    if processes is not None:
        until = time.monotonic() + (MOST_WAITING_S if earlier is not None and processes else 0)
        while time.monotonic() < until and all(process.poll() is None for process in processes):
            time.sleep(0.05)  # the first one may not have reported its error yet
        kill_ranks(trainer)
    if earlier is not None:
        raise AnotherRankFailed(earlier) from None


def _status_of_earlier(status: int) -> int | None:
    """The exit status of the rank that failed before this one; None where this is the first."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    note = f"{dist.get_rank()} {status}"
    try:
        first = compare_and_set(_FAILED, "", note)
    except dist.DistError:  # rank 0 keeps the notes
        log.error("stopped, as rank 0 has ended")
        return status
    return None if first == note else int(first.split()[1])
