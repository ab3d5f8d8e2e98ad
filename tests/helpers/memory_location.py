"""A location of this process alone, in fsspec's memory, in place of a bucket."""

from __future__ import annotations

import uuid
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from lightning_bge.runtime.locations import RemotePath, open_location


def memory_location() -> RemotePath:
    """A new one, which is empty."""
    found = open_location("files", f"bucket://{uuid.uuid4().hex}/run")
    assert isinstance(found, RemotePath)
    return found


class Bucket(MemoryFileSystem):
    """That memory as `bucket://`: the search refuses `memory://`, whose files are gone with the process."""

    protocol = "bucket"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(path.removeprefix("bucket://"))


fsspec.register_implementation("bucket", Bucket)
