"""Every kind of out-of-memory error is recognised and look-alikes are not; the clean-up after one."""

from __future__ import annotations

import errno
import gc

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from lightning_bge.runtime import oom
from lightning_bge.runtime.memory import SMALLEST_HEAP, Limit, live_bytes
from lightning_bge.runtime.oom import OutOfMemory, OutOfMemoryError, clean_up, find_oom, record_oom

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
    assert (found.requested, found.free) == (2 * 2**30, int(1.25 * 2**30))
    assert str(found) == "out of memory in backward: 2.0 GiB requested, 1.2 GiB were free"
    found = find_oom(RuntimeError(CPU))
    assert found is not None
    assert found.requested == 4096
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    found = find_oom(caught.value)
    assert found is not None
    assert found.requested == 2**62


@pytest.mark.parametrize(("free", "expected"), [(2**20, True), (2**31, False)])
def test_onednn_does_not_say_why(monkeypatch: pytest.MonkeyPatch, free: int, expected: bool) -> None:
    error = RuntimeError("could not create a primitive")
    assert find_oom(error) is None
    monkeypatch.setattr(oom, "limits", lambda *_: [Limit("RLIMIT_AS", 2**40, 2**40 - free, raises=True)])
    assert (find_oom(error) is not None) == expected


def test_a_killed_worker_is_of_another_kind() -> None:
    found = find_oom(RuntimeError("DataLoader worker (pid 123) is killed by signal: Killed. "))
    assert found is not None
    assert found.kind == "worker"
    assert find_oom(RuntimeError("DataLoader worker (pid 123) is killed by signal: Segmentation fault. ")) is None


def test_a_record_stays_with_the_error() -> None:
    error = MemoryError()
    record = record_oom(error, "validation")
    assert record is not None
    assert find_oom(error, "elsewhere") is record
    assert record_oom(ValueError(), "validation") is None


def test_clean_up_frees_the_locals_of_what_led_to_an_error() -> None:
    def inner() -> None:
        held = torch.ones(10**6)
        raise MemoryError(str(held.shape))

    def outer() -> None:
        try:
            inner()
        except MemoryError as error:
            held = torch.ones(10**6)
            raise ValueError(str(held.shape)) from error

    gc.collect()
    before = live_bytes()
    with pytest.raises(ValueError, match="1000000") as caught:
        outer()
    assert live_bytes() - before == 8 * 10**6
    clean_up(caught.value)
    assert live_bytes() <= before


def test_large_tensors_leave_no_holes_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("lightning_bge.runtime.oom.limit_malloc", asked.append)
    clean_up()
    assert asked == [SMALLEST_HEAP]


def test_clean_up_ends_where_an_error_leads_to_itself() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    clean_up(one)
