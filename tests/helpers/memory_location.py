"""A location of this process alone, in fsspec's memory, in place of a bucket."""

from __future__ import annotations

import uuid

from lightning_bge.runtime.locations import RemotePath, open_location


def memory_location() -> RemotePath:
    """A new one, which is empty."""
    found = open_location("files", f"memory://{uuid.uuid4().hex}/run")
    assert isinstance(found, RemotePath)
    return found
