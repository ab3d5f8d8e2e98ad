"""Memory: the limits of this process, what it holds, and how it frees memory."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

import torch

from lightning_bge.runtime.compat.torch import clear_cublas_workspaces

if sys.platform != "win32":
    import resource

PLAIN = (torch.Tensor, torch.nn.Parameter)
PRIMITIVES = 64  # kept, several times as many as the layers of one micro-batch need
M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -8, -3, -1  # of mallopt(3)
SMALLEST_HEAP, LARGEST_HEAP = 2**17, 2**25  # bytes: M_MMAP_THRESHOLD as glibc starts with it, and the most it takes


# ---------------------------------------------------------------------- what is held, and freeing it


def release(host: bool = True) -> None:
    """Free memory that nothing uses: garbage first, then what the allocators hold back.

    Args:
        host: what the C library holds back too, from which the next allocations would be served faster.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        clear_cublas_workspaces()
        torch.cuda.empty_cache()
    if host and (trim := _glibc("malloc_trim")) is not None:
        trim(0)


def limit_malloc(largest: int | None = None) -> bool:
    """Where RLIMIT_AS or RLIMIT_DATA is set, decide which tensors come from the C library's heap.

    glibc gives threads arenas of their own and reserves 64 MiB for each, used or not: threads that read weights or
    draw a progress bar then take more of such a limit than a small model does. From now on all threads share one. And
    once tensors of up to 32 MiB were freed, glibc serves such ones from its heap, which gets holes that larger ones do
    not fit into: a step that fitted fails later. Tensors with pages of their own leave no holes, but each time the
    pages have to be asked for and cleared. They get none where a free block of the heap is large enough.

    Twice the size of the largest tensor may stay free at the heap's end, as glibc has it where it sets both itself: by
    its fixed 128 KiB each tensor that is freed there gives its pages back, and the next one asks for them.

    Args:
        largest: bytes. From now on tensors of at most this size come from the heap, between `SMALLEST_HEAP`, with
            which a step takes nearly the same each time, and `LARGEST_HEAP`. None: 1/16 of what is free.

    Returns:
        Whether there is such a limit, and glibc.
    """
    free = min((limit.free for limit in _host_limits(None) if limit.raises), default=None)
    if free is None or (mallopt := _glibc("mallopt")) is None:
        return False
    mallopt(M_ARENA_MAX, 1)
    size = min(max(free // 16 if largest is None else largest, SMALLEST_HEAP), LARGEST_HEAP)
    mallopt(M_MMAP_THRESHOLD, size)
    mallopt(M_TRIM_THRESHOLD, 2 * size)
    return True


def limit_primitive_caches() -> None:
    """Keep few of oneDNN's primitives: to be called before the first computation on a CPU.

    oneDNN, and torch in front of it, keep up to 1,024 primitives of a process, one for each shape, some 100 kB each.
    Micro-batches without padding have all kinds of shapes, of which hardly one comes again, so that a long run would
    only gather them. The layers of one micro-batch find theirs among the last few. Values of the user's are kept.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(PRIMITIVES))


@cache
def _glibc(name: str) -> Any:
    """A function of glibc; None with another C library."""
    try:
        return getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return None


def live_bytes() -> int:
    """Bytes of all live tensors: on GPUs as the allocators count them, on the host those that Python can reach.

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


# ---------------------------------------------------------------------- caches that only save time


class MemoryCache(Protocol):
    """Something that holds memory of the host only to save time.

    Attributes:
        capacity: the most bytes that it will hold.
    """

    capacity: int

    @property
    def nbytes(self) -> int:
        """Bytes that it holds now."""

    def shrink(self) -> None:
        """Drop what is not in use."""


_caches: WeakSet[MemoryCache] = WeakSet()


def register_cache(cache: MemoryCache) -> None:
    """Let `shrink_caches` and `cache_bytes` know of a cache for as long as it lives."""
    _caches.add(cache)


def shrink_caches() -> None:
    """Have all registered caches drop what is not in use, as memory has run out."""
    for known in list(_caches):
        known.shrink()


def cache_bytes() -> tuple[int, int]:
    """Bytes of the host that registered caches may yet fill, and the most that they may hold in all."""
    known = list(_caches)
    return sum(max(one.capacity - one.nbytes, 0) for one in known), sum(one.capacity for one in known)


# ---------------------------------------------------------------------- limits


@dataclass(frozen=True)
class Limit:
    """A limit on memory, and how much of it is used.

    Attributes:
        name: what sets it.
        total: bytes.
        used: bytes, now.
        stated: whether it was set for this process, unlike the machine's own memory.
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


def unreserved_use(device: torch.device) -> tuple[int, int]:
    """Bytes of a GPU in use that are not this process's tensors or their caches, and all of its bytes.

    They are those of other processes, and CUDA's own of this one.
    """
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device), total


def _cuda_limits(device: torch.device, given: int | None) -> list[Limit]:
    others, total = unreserved_use(device)
    allocated = torch.cuda.memory_allocated(device)
    found = [Limit("the GPU's memory", total, others + allocated, stated=False, raises=True)]
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
