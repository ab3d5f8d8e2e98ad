"""What a process remembers of compiled layers is forgotten between tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo

from lightning_bge.callbacks.compile import callback as compile_module
from tests.helpers.stacks import Slow


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process remembers is forgotten between tests; torch, too, has a limit of graphs for a function."""
    torch.compiler.reset()
    monkeypatch.setattr(compile_module, "_findings", {})
    monkeypatch.setattr(compile_module, "_logged", {})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The clock of `Slow`; and what is compiled runs eager, as only the decision matters."""
    monkeypatch.setattr(compile_module, "_clock", lambda: Slow.now)
    with torch.compiler.set_stance("force_eager"):
        yield
