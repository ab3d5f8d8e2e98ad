"""Micro-batch sizes that were found, kept for this process and, in a file each, for others."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from lightning.pytorch import LightningModule, Trainer

from lightning_bge.errors import StudyError
from lightning_bge.runtime.cache_dir import MICRO_BATCH_SIZES, mark_used
from lightning_bge.runtime.compat.torch import compiled_call
from lightning_bge.runtime.log_once import log_once
from lightning_bge.runtime.run_folder import create_run_dir, read_json, write_json

log = logging.getLogger(__name__)

IRRELEVANT = ("params", "lr", "initial_lr", "weight_decay")  # of an optimizer's options

_known: dict[str, FoundSize] = {}


def forget() -> None:
    """Forget what this process knows, but not the files."""
    _known.clear()


class FoundSize(NamedTuple):
    """A micro-batch size, and why it is this one.

    Attributes:
        micro_batch_size: the size.
        reason: in one line.
        heap: bytes of the largest tensor that comes from the C library's heap, for `limit_malloc`; None: its default.
    """

    micro_batch_size: int
    reason: str
    heap: int | None = None


def _size(found: FoundSize) -> tuple[int, int]:
    return found.micro_batch_size, found.heap or 0


class MicroBatchSizes:
    """Found sizes by key.

    Args:
        folder: a cache folder; None: this process alone.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = None if folder is None else folder / MICRO_BATCH_SIZES

    def get(self, key: str) -> FoundSize | None:
        """The smallest size that is known, as another process may have lowered it; None where the key is not known."""
        found = [one for one in (_known.get(key), self._read(key)) if one is not None]
        return min(found, key=_size, default=None)

    def put(self, key: str, found: FoundSize) -> None:
        """Keep a size, unless a smaller one is known: another process may have lowered it meanwhile."""
        _known[key] = found
        if self.folder is not None:
            try:
                with FileLock(create_run_dir(self.folder).with_suffix(".lock"), mode=0o600):
                    smallest = min(found, self._read(key) or found, key=_size)
                    write_json(self.folder / f"{key}.json", smallest._asdict())
            except OSError as error:
                text = f"micro-batch sizes can't be kept in {self.folder} ({error}): each process finds its own"
                log_once(log, logging.WARNING, text)

    def _read(self, key: str) -> FoundSize | None:
        if self.folder is None:
            return None
        path = self.folder / f"{key}.json"
        try:
            content = read_json(path)
            mark_used(path)
            if content is None:
                return None
            heap = content["heap"]
            return FoundSize(
                int(content["micro_batch_size"]), str(content["reason"]), None if heap is None else int(heap)
            )
        except (OSError, StudyError, ValueError, KeyError, TypeError, AttributeError) as error:
            log_once(log, logging.WARNING, f"{path} can't be read ({error}): the size is found anew")
            return None


def describe_step(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """What the memory of a step depends on, as far as module and trainer show it.

    Of numbers such as momentum and dropout only whether they are 0 is compared.
    """
    weights = [(tuple(p.shape), str(p.dtype), p.requires_grad) for p in module.parameters()]
    parts = [(type(part).__qualname__, _flags(part)) for part in module.modules()]
    net = getattr(module, "net", None)
    return {
        "module": f"{type(module).__module__}.{type(module).__qualname__}",
        "parts": hashlib.sha256(repr((weights, parts)).encode()).hexdigest(),
        "attention": str(getattr(net, "attention", None)),
        "compiled": sum(compiled_call(part) is not None for part in module.modules()),
        "precision": str(trainer.precision),
        "clipping": trainer.gradient_clip_val is not None,
        "validation": trainer.enable_validation,
        "optimizers": [
            (type(o).__qualname__, [{k: _kind(v) for k, v in g.items() if k not in IRRELEVANT} for g in o.param_groups])
            for o in trainer.optimizers
        ],
        "device": _device_name(module.device),
        "world_size": trainer.world_size,
        "torch": torch.__version__,
    }


def digest(content: dict[str, Any]) -> str:
    """A key for plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _flags(part: torch.nn.Module) -> list[tuple[str, bool]]:
    """Switches such as `gradient_checkpointing`, and whether there is dropout; none that a step sets."""
    flags = [
        (name, value) for name, value in vars(part).items() if isinstance(value, bool) and not name.startswith("_")
    ]
    rate = getattr(part, "p", None)
    if isinstance(rate, float | int):
        flags.append(("p", rate > 0))
    return sorted(flags)


def _kind(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    return bool(value) if isinstance(value, float | int) else type(value).__name__


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
