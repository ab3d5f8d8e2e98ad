"""The options, the meters, and the limits that the search considers."""

from __future__ import annotations

import math
import mmap
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_bge.callbacks.micro_batch import finder as finder_module
from lightning_bge.callbacks.micro_batch import probe as probe_module
from lightning_bge.callbacks.micro_batch.config import MemoryConfig
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.callbacks.micro_batch.probe import HostMeter
from lightning_bge.errors import ConfigError
from lightning_bge.runtime.memory import Limit, process_bytes, register_cache, release
from tests.helpers.trial_steps import HELD, ROW, Foreign, Rows, SimpleCache, Use, search, train

pytestmark = [
    pytest.mark.usefixtures("forgetful"),
    pytest.mark.filterwarnings("ignore:Found . module.* in eval mode"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`"),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
]


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"limit_gb": 0}, "memory.limit_gb: expected a number above 0, or null, got 0"),
        ({"limit_gb": math.nan}, "memory.limit_gb"),
        ({"safety_margin": 1.0}, r"memory.safety_margin: expected 0 to below 1, got 1.0"),
        ({"safety_margin": -0.1}, "memory.safety_margin"),
        ({"min_speedup": -1}, "memory.min_speedup: expected 0 or more, or null, got -1"),
        ({"default_size": 0}, "memory.default_size: expected 1 token or more, got 0"),
    ],
)
def test_bad_settings(bad: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        MemoryConfig(**bad)


linux = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured on Linux")


@linux
def test_the_meter_sees_what_was_freed_again() -> None:
    meter = HostMeter(address_space=False)
    for size in (64, 48):
        release()  # as before each trial step: else glibc hands out resident pages that other tests have freed
        meter.start()
        torch.ones(size * 2**18)  # 4 bytes each
        assert meter.peak() == pytest.approx(size * 2**20, abs=8 * 2**20)
    assert meter.now() <= meter.now()


@linux
def test_the_meter_sees_address_space_that_nobody_has_written() -> None:
    status = process_bytes()
    unseen = status["VmPeak"] - status["VmSize"] + 64 * 2**20  # enough for a new peak
    for address_space, least in ((False, 0), (True, unseen - 8 * 2**20)):
        meter = HostMeter(address_space)
        meter.start()
        mmap.mmap(-1, unseen + 64 * 2**20 * address_space).close()  # never from what malloc holds, unlike a tensor
        assert least <= meter.peak() <= least + 2 * 64 * 2**20
        meter.start()
        mmap.mmap(-1, 32 * 2**20).close()  # no new one
        assert meter.peak() < 8 * 2**20


def test_what_may_be_tried_is_tried_on_a_gpu_only() -> None:
    known = [Limit("a", 100, 0, raises=True), Limit("b", 75, 0), Limit("c", 90, 20, raises=True)]
    assert finder_module._untried_bytes(known, on_host=False) == 75
    assert finder_module._untried_bytes(known[:1], on_host=False) is None
    assert finder_module._untried_bytes(known, on_host=True) == 70
    assert finder_module._untried_bytes([], on_host=True) is None


def test_what_others_may_yet_take_to_save_time_is_left_to_them(use: Use) -> None:
    free, _ = search(use)
    spare = SimpleCache(capacity=4000, nbytes=1000)
    register_cache(spare)
    known = [Limit("a", 10_000, 0)]
    assert finder_module._untried_bytes(known, on_host=True) == 7000
    assert finder_module._untried_bytes(known, on_host=False) == 10_000
    assert finder_module._untried_bytes([Limit("a", 2000, 0)], on_host=True) == 0
    first, finder = search(use)
    assert finder.tried  # what was found without it would be too much
    assert HELD + ROW * first.micro_batch_size <= 7000 < HELD + ROW * free.micro_batch_size
    spare.nbytes = 4000
    again, finder = search(use)
    assert not finder.tried
    assert again.micro_batch_size == first.micro_batch_size
    del spare
    assert finder_module._untried_bytes(known, on_host=True) == 10_000


@linux
def test_a_given_limit_is_searched_on_a_cpu() -> None:
    """With real memory: at least 12,000 bytes of a row's activations, of a validation batch of two, and 40 MiB."""
    data = Rows(step=64)
    finder = MicroBatchFinder(MemoryConfig(limit_gb=used_gb() + 40 / 1024, min_speedup=None, cache=False))

    class Wide(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 1000), nn.Linear(1000, 6))
            self.frozen = nn.Sequential()

    train(Wide(), data, finder)
    assert "(memory.limit_gb)" in finder.reason
    # code that runs for the first time, and what the allocator keeps, take a part of the 40 MiB, which varies
    assert 300 < data.micro_batch_size < 3400
    assert all(peak is None or peak < 40 * 2**20 for _, peak, _ in finder.tried)


def used_gb() -> float:
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 2**20


def test_what_was_there_before_a_search_is_left_out_of_its_collections(
    use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    names = ("collect", "freeze", "unfreeze")
    spy = SimpleNamespace(get_freeze_count=lambda: 0, **{name: partial(calls.append, name) for name in names})
    monkeypatch.setattr(probe_module, "gc", spy)
    search(use)
    assert calls == ["collect", "freeze", "unfreeze"]
