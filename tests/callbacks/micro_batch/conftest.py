"""No test of this folder uses another's cache; machines with a stated amount of memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest

from lightning_bge.callbacks.micro_batch import cache as cache_module
from lightning_bge.callbacks.micro_batch import finder as finder_module
from lightning_bge.callbacks.micro_batch import probe as probe_module
from lightning_bge.runtime.memory import Limit
from tests.helpers.trial_steps import FakeMeter, Use


@pytest.fixture
def forgetful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LIGHTNING_BGE_CACHE", str(tmp_path / "cache"))
    # slow
    for module in (probe_module, finder_module):
        monkeypatch.setattr(module, "release", lambda: None)
    monkeypatch.setattr(probe_module, "gc", SimpleNamespace(collect=lambda: 0, get_freeze_count=lambda: 1))
    monkeypatch.setattr("lightning_bge.runtime.memory._caches", WeakSet())
    cache_module.forget()
    yield
    cache_module.forget()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """A machine of so much memory, of which the batches of `data` take their share."""

    def choose(data: Any, total: int | None) -> None:
        known = [] if total is None else [Limit("RLIMIT_AS", total, 0, raises=True)]
        monkeypatch.setattr(finder_module, "limits", lambda *_: known)
        monkeypatch.setattr(finder_module, "make_meter", lambda *_, **__: FakeMeter(data))

    return choose
