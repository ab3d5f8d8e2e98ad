"""What an out-of-memory error is, and the one way to clean up after it."""

import errno
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_bge.errors import UserError
from lightning_bge.runtime.memory import SMALLEST_HEAP, free_bytes, limit_malloc, limits, release, shrink_caches
from lightning_bge.runtime.units import format_bytes

# Texts of `RuntimeError`s that mean a failed allocation. torch gives them no class of their own.
TEXTS = (
    "out of memory",  # "CUDA error: out of memory", "CUDA out of memory", "HIP out of memory", "MPS backend ..."
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "can't allocate memory",  # DefaultCPUAllocator on Linux and macOS
    "not enough memory: you tried to allocate",  # DefaultCPUAllocator on Windows
    "std::bad_alloc",
    "cannot allocate memory",  # ENOMEM in the system's words, as safetensors passes it on
)
# oneDNN gives no reason: these texts count where little memory is left under a limit that makes allocations fail.
ONEDNN = ("could not create a primitive", "could not execute a primitive", "could not create a memory object")
LITTLE = 2**30
WORKER = re.compile(r"DataLoader worker \(pid.*?\) is killed by signal: Killed")
UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
REQUESTED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) (bytes|[KMGT]iB)", re.IGNORECASE)
FREE = re.compile(r"of which ([\d.]+) (bytes|[KMGT]iB) is free", re.IGNORECASE)


@dataclass(frozen=True)
class OutOfMemory:
    """What is known of a failed allocation.

    Attributes:
        where: what was being done: forward, backward, optimizer, validation, data...
        kind: `device` (the model's memory: smaller micro-batches help), or `worker` (a killed data loader worker: the
            host's memory, where they do not help).
        requested: bytes that the failed allocation requested; None where the error does not say.
        free: bytes that were free; None where unknown.
        text: the error's first line.
    """

    where: str
    kind: Literal["device", "worker"]
    requested: int | None
    free: int | None
    text: str

    def __str__(self) -> str:
        requested = "an unknown amount" if self.requested is None else format_bytes(self.requested)
        free = "" if self.free is None else f", {format_bytes(self.free)} were free"
        return f"out of memory in {self.where}: {requested} requested{free}"


class OutOfMemoryError(UserError):
    """Memory ran out, and nothing that saves memory is left to try.

    Attributes:
        oom: what is known of the last failure.
    """

    def __init__(self, text: str, oom: OutOfMemory) -> None:
        super().__init__(text)
        self.oom = oom


def find_oom(error: BaseException, where: str = "training") -> OutOfMemory | None:
    """What is known of the failed allocation behind an error; None where there is none, so that it must be raised.

    It considers the error, what it was raised from or while handling, and the `inner_exception` of a compiler's error.
    Out of memory are `torch.OutOfMemoryError`, `MemoryError`, an `OSError` ENOMEM, and a `RuntimeError` (such as
    `torch.AcceleratorError`) whose text says so; oneDNN's texts, which give no reason, where under 1 GiB is left below
    a limit such as RLIMIT_AS. Triton's `OutOfResources` is about registers and shared memory, so it does not count.

    Args:
        error: any exception. Where `record_oom` has seen it before, that record is returned.
        where: what was being done.
    """
    for link in _chain(error):
        if isinstance(record := getattr(link, "oom", None), OutOfMemory):
            return record
        kind = _kind(link)
        if kind is not None:
            text = str(link)
            requested, free = _amount(REQUESTED, text), _amount(FREE, text)
            first = next(iter(text.strip().splitlines()), type(link).__name__)
            return OutOfMemory(where, kind, requested, free_bytes() if free is None else free, first[:500])
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    waiting, seen = [error], set()
    while waiting:
        link = waiting.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        context = None if link.__suppress_context__ else link.__context__
        following = (link.__cause__, context, getattr(link, "inner_exception", None))
        waiting += [other for other in following if isinstance(other, BaseException)]


def _kind(error: BaseException) -> Literal["device", "worker"] | None:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "device"
    if isinstance(error, OSError):
        return "device" if error.errno == errno.ENOMEM else None
    if not isinstance(error, RuntimeError) or type(error).__name__ == "OutOfResources":
        return None
    text = str(error)
    if WORKER.search(text):
        return "worker"
    if text.strip() in ONEDNN:
        return "device" if any(limit.raises and limit.free < LITTLE for limit in limits()) else None
    return "device" if any(known in text.lower() for known in TEXTS) else None


def _amount(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    return None if found is None else int(float(found.group(1)) * UNITS[found.group(2).lower()])


def record_oom(error: BaseException, where: str) -> OutOfMemory | None:
    """As `find_oom`, and keep the record with the error: whoever handles it later finds what was being done.

    Args:
        error: any exception.
        where: what was being done.
    """
    record = find_oom(error, where)
    if record is not None:
        error.oom = record  # type: ignore[attr-defined]
    return record


def clean_up(error: BaseException | None = None) -> None:
    """Free what a step that ran out of memory has left behind. Every handler of such an error calls this.

    First go the local variables of the finished frames that the error, and what led to it, keep alive; then caches that
    only save time; then garbage, and what the allocators hold back. Gradients belong to who trains: drop them first.
    Under a limit on the address space large tensors have pages of their own from then on, and leave no holes.

    Args:
        error: the error, where it is still being handled. None: it is gone.
    """
    link, seen = error, set[int]()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    shrink_caches()
    release()
    limit_malloc(SMALLEST_HEAP)
