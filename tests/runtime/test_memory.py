"""The detector against every kind of out-of-memory error and against look-alikes; limits; live bytes."""

from __future__ import annotations

import errno
import gc
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from lightning_bge.runtime import memory
from lightning_bge.runtime.memory import (
    Limit,
    OutOfMemory,
    OutOfMemoryError,
    _cgroup_limits,
    find_oom,
    limits,
    live_bytes,
    release,
    size,
)

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.25 GiB is free."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"
)
RECORD = OutOfMemory("forward", "device", 1, 2, "text")

REAL = [
    torch.OutOfMemoryError(CUDA),
    torch.AcceleratorError("CUDA error: out of memory"),
    MemoryError(),
    RuntimeError(CPU),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("unable to mmap 1281788 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    BackendCompilerFailed(lambda: None, torch.OutOfMemoryError(CUDA), None),
    OutOfMemoryError("text", RECORD),
]
LOOK_ALIKES = [
    RuntimeError("shape mismatch"),
    ValueError("out of memory"),
    KeyError("out of memory"),
    OSError(errno.ENOSPC, "No space left on device"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    BackendCompilerFailed(lambda: None, RuntimeError("shape mismatch"), None),
    type("OutOfResources", (RuntimeError,), {})("out of resource: shared memory, ran out of memory on chip"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", REAL, ids=lambda error: f"{type(error).__name__}: {error}"[:50])
def test_real_ones(error: BaseException) -> None:
    found = find_oom(error, "forward")
    assert found is not None
    assert (found.kind, found.where) == ("device", "forward")


@pytest.mark.parametrize("error", LOOK_ALIKES, ids=lambda error: f"{type(error).__name__}: {error}"[:50])
def test_look_alikes(error: BaseException) -> None:
    assert find_oom(error) is None


def raised(how: str) -> BaseException:
    try:
        try:
            raise torch.OutOfMemoryError(CUDA)
        except RuntimeError as error:
            if how == "cause":
                raise ValueError("while computing") from error
            if how == "none":
                raise ValueError("while computing") from None
            raise ValueError("while computing")  # noqa: B904
    except ValueError as error:
        return error


def test_what_led_to_an_error_counts() -> None:
    assert find_oom(raised("cause")) is not None
    assert find_oom(raised("context")) is not None
    assert find_oom(raised("none")) is None


def test_an_error_that_leads_to_itself_ends() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert find_oom(one) is None


def test_amounts() -> None:
    found = find_oom(torch.OutOfMemoryError(CUDA), "backward")
    assert found is not None
    assert (found.asked, found.free) == (2 * 2**30, int(1.25 * 2**30))
    assert str(found) == "out of memory in backward: 2.0 GiB asked, 1.2 GiB were free"
    found = find_oom(RuntimeError(CPU))
    assert found is not None
    assert found.asked == 4096
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    found = find_oom(caught.value)
    assert found is not None
    assert found.asked == 2**62


@pytest.mark.parametrize(("free", "expected"), [(2**20, True), (2**31, False)])
def test_onednn_does_not_say_why(monkeypatch: pytest.MonkeyPatch, free: int, expected: bool) -> None:
    error = RuntimeError("could not create a primitive")
    assert find_oom(error) is None
    monkeypatch.setattr(memory, "limits", lambda *_: [Limit("RLIMIT_AS", 2**40, 2**40 - free, raises=True)])
    assert (find_oom(error) is not None) == expected


def test_a_killed_worker_is_of_another_kind() -> None:
    found = find_oom(RuntimeError("DataLoader worker (pid 123) is killed by signal: Killed. "))
    assert found is not None
    assert found.kind == "worker"
    assert find_oom(RuntimeError("DataLoader worker (pid 123) is killed by signal: Segmentation fault. ")) is None


def test_live_bytes_counts_each_storage_once() -> None:
    gc.collect()
    before = live_bytes()
    tensor = torch.ones(1000)
    view = tensor[10:].view(-1, 10)
    parameter = torch.nn.Parameter(torch.ones(10))
    assert live_bytes() - before == 4040
    del tensor, parameter
    assert live_bytes() - before == 4000
    del view
    release()
    assert live_bytes() == before


def test_sizes() -> None:
    assert [size(n) for n in (12, 2048, 1.5 * 2**30, 2**41)] == ["12 bytes", "2.0 KiB", "1.5 GiB", "2048.0 GiB"]


def test_limits_of_this_process() -> None:
    found = limits(torch.device("cpu"), given=2**50)
    assert {limit.name for limit in found} >= {"memory.limit_gb"}
    assert [limit.free for limit in found] == sorted(limit.free for limit in found)
    assert all(limit.used > 0 for limit in found)
    assert limits(torch.device("meta")) == []
    assert Limit("x", 10, 12).free == 0


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_control_groups_of_version_2(tmp_path: Path) -> None:
    root, mine = tmp_path / "cgroup", tmp_path / "self"
    write(root, memory__max="max\n", memory__current="1\n")
    write(root / "a", memory__max="1000\n", memory__current="400\n", memory__stat="anon 1\ninactive_file 100\n")
    write(root / "a" / "b", memory__max="max\n", memory__current="300\n")
    mine.write_text("0::/a/b\n")
    [limit] = _cgroup_limits(root, mine)
    assert (limit.total, limit.used, limit.stated, limit.raises) == (1000, 300, True, False)


def test_control_groups_of_version_1_in_a_container(tmp_path: Path) -> None:
    root, mine = tmp_path / "cgroup", tmp_path / "self"
    write(root / "memory", memory__limit_in_bytes="5000\n", memory__usage_in_bytes="50\n")
    mine.write_text("5:memory:/docker/not/mounted\n4:cpu,cpuacct:/\n0::/\n")
    [limit] = _cgroup_limits(root, mine)
    assert (limit.total, limit.used) == (5000, 50)
    write(root / "memory", memory__limit_in_bytes="9223372036854771712\n")
    assert list(_cgroup_limits(root, mine)) == []
