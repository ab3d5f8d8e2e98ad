"""Limits of this process, live bytes, control groups."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_bge.runtime.memory import (
    LARGEST_HEAP,
    PRIMITIVES,
    SMALLEST_HEAP,
    Limit,
    _cgroup_limits,
    limit_primitive_caches,
    limits,
    live_bytes,
    release,
)
from lightning_bge.runtime.units import format_bytes


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


def test_bytes_are_written_with_their_unit() -> None:
    assert [format_bytes(n) for n in (12, 2048, 1.5 * 2**30, 2**41)] == ["12 bytes", "2.0 KiB", "1.5 GiB", "2048.0 GiB"]


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


MANY_SHAPES = """
import ctypes, sys, torch
from lightning_bge.runtime.memory import limit_primitive_caches

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c d e f used g h".split()]

def used():
    function = ctypes.CDLL("libc.so.6").mallinfo2
    function.restype = Info
    return function().used

if sys.argv[1] == "few":
    limit_primitive_caches()
layer, counts = torch.nn.Linear(64, 64).bfloat16(), []
with torch.inference_mode():
    for rows in range(1, 801):
        layer(torch.ones(rows, 64, dtype=torch.bfloat16))
        counts.append(used())
print(counts[-1] - counts[150])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_products_of_many_shapes_leave_little_behind() -> None:
    def gathered(how: str) -> int:
        names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        command = [sys.executable, "-c", MANY_SHAPES, how]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    many = gathered("all")
    if many < 2**20:
        pytest.skip("this CPU multiplies without primitives")
    assert gathered("few") < many / 4


MAPPED = """
import ctypes, resource, sys, torch
from lightning_bge.runtime.memory import limit_malloc, process_bytes

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped e f used g h".split()]

def mapped():
    function = ctypes.CDLL("libc.so.6").mallinfo2
    function.restype = Info
    return function().mapped

name, largest, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
if name:
    what = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}[name]
    limit = process_bytes()[what] + 256 * 2**20
    resource.setrlimit(getattr(resource, name), (limit, limit))
assert limit_malloc(int(largest) if largest else None) == bool(name)
before = mapped()
for _ in range(3):  # glibc serves a second one from its heap
    tensor = torch.ones(size, dtype=torch.uint8)
    found = mapped() - before
    del tensor
print(found >= size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
@pytest.mark.parametrize(
    ("limit", "largest", "size", "has_pages_of_its_own"),
    [
        ("", None, 24 * 2**20, False),
        ("RLIMIT_AS", None, 24 * 2**20, True),  # more than 1/16 of 256 MiB
        ("RLIMIT_DATA", None, 24 * 2**20, True),
        ("RLIMIT_AS", None, 4 * 2**20, False),
        ("RLIMIT_AS", SMALLEST_HEAP, 4 * 2**20, True),
        ("RLIMIT_AS", LARGEST_HEAP, 24 * 2**20, False),
        ("RLIMIT_AS", LARGEST_HEAP, 40 * 2**20, True),
    ],
)
def test_which_tensors_have_pages_of_their_own_under_a_limit(
    limit: str, largest: int | None, size: int, has_pages_of_its_own: bool
) -> None:
    command = [sys.executable, "-c", MAPPED, limit, str(largest or ""), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(has_pages_of_its_own)


def test_capacities_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    limit_primitive_caches()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == str(PRIMITIVES)
