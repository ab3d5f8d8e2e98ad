"""Warnings that runs as small as those of these tests cause."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch._dynamo

EXPECTED = (
    ".*does not have many workers.*|.*smaller than the logging interval.*|.*in eval mode.*|.*persistent_workers=True.*"
    "|The .grad attribute of a Tensor that is not a leaf.*|`torch.jit.*"
)


@pytest.fixture(autouse=True)
def expected_warnings() -> Iterator[None]:
    """Lightning advises more workers, and a lower log interval, for loaders as small as these."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", EXPECTED)
        yield
    torch._dynamo.reset()
