"""Where this program keeps what later runs can use: tokenized texts, micro-batch sizes."""

import os
from contextlib import suppress
from pathlib import Path

CACHE_ENV = "LIGHTNING_BGE_CACHE"
MICRO_BATCH_SIZES = "micro_batch_sizes"  # a folder in it


def default_cache_dir() -> Path:
    """The folder in the environment variable `LIGHTNING_BGE_CACHE`, else `~/.cache/lightning-bge`."""
    return Path(os.environ.get(CACHE_ENV) or "~/.cache/lightning-bge").expanduser()


def mark_used(path: Path) -> None:
    """Make now the time of change of a file in the cache, by which the least recently used ones are found."""
    # A file of another user, or on a read-only disk, can't be marked, and one that another process has deleted need
    # not be: what is read from it is right all the same.
    if path.name:  # tokens in memory have an empty path
        with suppress(OSError):
            os.utime(path)
