"""Limits of this process, live bytes, control groups."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from lightning_bge.runtime.memory import Limit, _cgroup_limits, limits, live_bytes, release
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
