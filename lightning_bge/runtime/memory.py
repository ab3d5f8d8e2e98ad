"""Memory: what an out-of-memory error is, what the limits are, what is held, and how it is given back."""

from __future__ import annotations

import ctypes
import errno
import gc
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol
from weakref import WeakSet

import torch

from lightning_bge.errors import UserError

if sys.platform != "win32":
    import resource

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
# oneDNN keeps its reason to itself: these count where little memory is left under a limit that makes allocations fail.
ONEDNN = ("could not create a primitive", "could not execute a primitive", "could not create a memory object")
LITTLE = 2**30
WORKER = re.compile(r"DataLoader worker \(pid.*?\) is killed by signal: Killed")
PLAIN = (torch.Tensor, torch.nn.Parameter)
UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
M_ARENA_MAX = -8  # of mallopt(3)
ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) (bytes|[KMGT]iB)", re.IGNORECASE)
FREE = re.compile(r"of which ([\d.]+) (bytes|[KMGT]iB) is free", re.IGNORECASE)


@dataclass(frozen=True)
class OutOfMemory:
    """What is known of a failed allocation.

    Attributes:
        where: what was being done: forward, backward, optimizer, validation, data...
        kind: `device` (the model's memory, which smaller micro-batches mend), or `worker` (a killed data loader worker:
            the host's memory, which they do not).
        asked: bytes that were asked for; None where the error does not say.
        free: bytes that were free; None where unknown.
        text: the error's first line.
    """

    where: str
    kind: Literal["device", "worker"]
    asked: int | None
    free: int | None
    text: str

    def __str__(self) -> str:
        asked = "an unknown amount" if self.asked is None else size(self.asked)
        free = "" if self.free is None else f", {size(self.free)} were free"
        return f"out of memory in {self.where}: {asked} asked{free}"


class OutOfMemoryError(UserError):
    """Nothing that would save memory is left to try.

    Attributes:
        oom: what is known of the last failure.
    """

    def __init__(self, text: str, oom: OutOfMemory) -> None:
        super().__init__(text)
        self.oom = oom


def find_oom(error: BaseException, where: str = "training") -> OutOfMemory | None:
    """What is known of the failed allocation behind an error; None where there is none, so that it must be raised.

    Looked at are the error, what it was raised from or while handling, and the `inner_exception` of a compiler's error.
    Out of memory are `torch.OutOfMemoryError`, `MemoryError`, an `OSError` ENOMEM, and a `RuntimeError` (such as
    `torch.AcceleratorError`) whose text says so; oneDNN's texts, which never say why, where under 1 GiB is left below
    a limit such as RLIMIT_AS. Triton's `OutOfResources` is about registers and shared memory: not.

    Args:
        error: any exception. What was found before and put into its attribute `oom` is believed.
        where: what was being done.
    """
    for link in _chain(error):
        if isinstance(record := getattr(link, "oom", None), OutOfMemory):
            return record
        kind = _kind(link)
        if kind is not None:
            text = str(link)
            asked, free = _amount(ASKED, text), _amount(FREE, text)
            first = next(iter(text.strip().splitlines()), type(link).__name__)
            return OutOfMemory(where, kind, asked, free_bytes() if free is None else free, first[:500])
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


def size(count: float) -> str:
    """Bytes as people write them: 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


# ---------------------------------------------------------------------- what is held, and giving it back


def release(host: bool = True) -> None:
    """Give back what nothing holds any more: garbage first, then the allocators' stores.

    Args:
        host: the C library's store too, from which the next allocations would be served faster.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch._C._cuda_clearCublasWorkspaces()  # 8 to 32 MiB for each handle, made again when needed
        torch.cuda.empty_cache()
    if host and (trim := _glibc("malloc_trim")) is not None:
        trim(0)


def spare_address_space() -> None:
    """Where RLIMIT_AS is set, have all threads allocate from one arena from now on.

    glibc gives threads arenas of their own and reserves 64 MiB of address space for each, used or not: threads that
    read weights or draw a progress bar then take more of such a limit than a small model does.
    """
    if sys.platform == "linux" and resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        mallopt = _glibc("mallopt")
        if mallopt is not None:
            mallopt(M_ARENA_MAX, 1)


@cache
def _glibc(name: str) -> Any:
    """A function of glibc; None with another C library."""
    try:
        return getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return None


def live_bytes() -> int:
    """Bytes of all live tensors: of the CUDA allocators' books, and on the host those that Python can reach.

    Storages are counted once. On the host this walks all of Python's objects, which takes a tenth of a second or more.
    """
    device = 0
    if torch.cuda.is_initialized():
        device = sum(torch.cuda.memory_allocated(number) for number in range(torch.cuda.device_count()))
    storages = {}
    for thing in gc.get_objects():
        # no subclasses: what torch.compile makes up while tracing has no memory
        if type(thing) in PLAIN and thing.layout == torch.strided and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return device + sum(storages.values())


# ---------------------------------------------------------------------- what is held to save time


class Spare(Protocol):
    """Something that holds memory of the host only to save time.

    Attributes:
        most: bytes that it will hold at the most.
    """

    most: int

    @property
    def nbytes(self) -> int:
        """Bytes that it holds now."""

    def give_way(self) -> None:
        """Let go of what nobody uses now."""


_spares: WeakSet[Spare] = WeakSet()


def register_spare(spare: Spare) -> None:
    """Have it asked by `give_way` for as long as it lives, and counted by `spare_bytes`."""
    _spares.add(spare)


def give_way() -> None:
    """Ask all that hold memory to save time to let go of it, as memory has run out."""
    for spare in list(_spares):
        spare.give_way()


def spare_bytes() -> tuple[int, int]:
    """Bytes of the host that may yet be taken to save time, and those that may be held so at the most."""
    known = list(_spares)
    return sum(max(spare.most - spare.nbytes, 0) for spare in known), sum(spare.most for spare in known)


# ---------------------------------------------------------------------- limits


@dataclass(frozen=True)
class Limit:
    """A limit on memory, and what is used of it.

    Attributes:
        name: who set it.
        total: bytes.
        used: bytes, now.
        stated: whether somebody set it, for this process; the machine's own memory is nobody's decision.
        raises: whether an allocation beyond it fails with an error. Else the process is killed, or others suffer.
    """

    name: str
    total: int
    used: int
    stated: bool = True
    raises: bool = False

    @property
    def free(self) -> int:
        """Bytes, at least 0."""
        return max(self.total - self.used, 0)


def limits(device: torch.device | None = None, given: int | None = None) -> list[Limit]:
    """All limits that this process is known to have on a device, the tightest first.

    Args:
        device: None: the current CUDA device if CUDA is in use, else the CPU.
        given: bytes that the user grants this process on the device.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    if device.type == "cuda":
        found = _cuda_limits(device, given)
    elif device.type == "cpu":
        found = _host_limits(given)
    else:
        found = []
    return sorted(found, key=lambda limit: limit.free)


def free_bytes(device: torch.device | None = None) -> int | None:
    """Bytes that are free under the tightest limit; None where none is known."""
    return next((limit.free for limit in limits(device)), None)


def _cuda_limits(device: torch.device, given: int | None) -> list[Limit]:
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    found = [Limit("the GPU's memory", total, total - free - reserved + allocated, stated=False, raises=True)]
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    if share < 1:
        found.append(Limit("torch.cuda.set_per_process_memory_fraction", int(share * total), allocated, raises=True))
    if given is not None:
        found.append(Limit("memory.limit_gb", given, allocated))
    return found


def _host_limits(given: int | None) -> list[Limit]:
    used = process_bytes()
    found = [*_cgroup_limits()]
    if sys.platform == "linux":
        for name, what in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
            soft = resource.getrlimit(getattr(resource, name))[0]
            if soft != resource.RLIM_INFINITY:
                found.append(Limit(name, soft, used[what], raises=True))
        info = _read_kib("/proc/meminfo")
        found.append(
            Limit("the machine's memory", info["MemTotal"], info["MemTotal"] - info["MemAvailable"], stated=False)
        )
    if given is not None and "VmRSS" in used:
        found.append(Limit("memory.limit_gb", given, used["VmRSS"]))
    return found


def process_bytes() -> dict[str, int]:
    """Bytes of this process by Linux's names: VmSize, VmData, VmRSS (resident), VmHWM (its peak); elsewhere empty."""
    return _read_kib("/proc/self/status") if sys.platform == "linux" else {}


def _read_kib(path: str) -> dict[str, int]:
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"}


def _cgroup_limits(root: Path = Path("/sys/fs/cgroup"), mine: Path = Path("/proc/self/cgroup")) -> Iterator[Limit]:
    """The limits of this process's control group and those above it, of version 2 and 1."""
    if not mine.is_file():
        return
    for line in mine.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # inside a container the path may be the host's, and its own group is mounted as the root
        inside = base / path.strip("/")
        for folder in dict.fromkeys((inside, *inside.parents, base)):
            if folder.is_relative_to(base) and (limit := _cgroup_limit(folder, *names)) is not None:
                yield limit


def _cgroup_limit(folder: Path, most: str, current: str, reclaimable: str) -> Limit | None:
    if not (folder / most).is_file() or not (folder / current).is_file():
        return None
    text = (folder / most).read_text().strip()
    if text == "max" or int(text) >= 2**60:  # version 1 writes a huge number for no limit
        return None
    used = int((folder / current).read_text())
    stat = folder / "memory.stat"
    cached = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
    return Limit(f"the control group's {most}", int(text), used - int(cached.get(reclaimable, 0)))
