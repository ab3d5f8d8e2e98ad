"""Where this program keeps what later runs can use: tokenized texts, micro-batch sizes."""

import os
from pathlib import Path

CACHE_ENV = "LIGHTNING_BGE_CACHE"


def default_cache_dir() -> Path:
    """The folder in the environment variable `LIGHTNING_BGE_CACHE`, else `~/.cache/lightning-bge`."""
    return Path(os.environ.get(CACHE_ENV) or "~/.cache/lightning-bge").expanduser()
