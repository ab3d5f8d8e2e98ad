from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.plain_flash import register_flash


@pytest.fixture
def flash_calls() -> Iterator[list[dict]]:
    """torch's flash operators work on the CPU; what they were called with, in order."""
    calls: list[dict] = []
    library = register_flash(calls)
    yield calls
    library._destroy()
