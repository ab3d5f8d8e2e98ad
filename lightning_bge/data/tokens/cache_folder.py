"""The files of the cache folder: listed, deleted, and kept below a limit by deleting those not used for longest."""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lightning_bge.runtime.cache_dir import MICRO_BATCH_SIZES, default_cache_dir
from lightning_bge.runtime.log_once import log_once
from lightning_bge.runtime.units import format_bytes

log = logging.getLogger(__name__)

DAY = 86400.0  # seconds
TOKENS, SIZES, UNFINISHED = "tokenized texts", "micro-batch sizes", "unfinished files"
PATTERNS = (  # what, and where it is
    *((TOKENS, "*.arrow"), (SIZES, f"{MICRO_BATCH_SIZES}/*.json")),
    *((UNFINISHED, "*.tmp"), (UNFINISHED, f"{MICRO_BATCH_SIZES}/.*.json-*")),
)


@dataclass(frozen=True)
class CachedFile:
    """A file in the cache folder.

    Attributes:
        path: where it is.
        kind: what it holds.
        size: in bytes.
        age: seconds since it was used; of an unfinished file, since it was written to.
    """

    path: Path
    kind: str
    size: int
    age: float


def cached_files(folder: Path) -> list[CachedFile]:
    """All files that this program keeps in a folder, most recently used first; other files are left out."""
    found, now = [], time.time()
    for kind, pattern in PATTERNS:
        for path in folder.glob(pattern):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another process has deleted it
            found.append(CachedFile(path, kind, status.st_size, max(0.0, now - status.st_mtime)))
    return sorted(found, key=lambda file: (file.age, file.path))


def clear_cache(folder: str | Path | None = None, older_than: float = 0.0) -> int:
    """Delete the files of the cache, which later runs make anew.

    A run that has a file open keeps its content, but ends with an error where it opens one again, as a refit and new
    worker processes do. An unfinished file is deleted if it is older than a day, as another process may be writing a
    younger one.

    Args:
        folder: of the cache; None: `default_cache_dir()`.
        older_than: in days; files used since then are kept.

    Returns:
        The bytes that this frees.
    """
    files = cached_files(default_cache_dir() if folder is None else Path(folder).expanduser())
    least = {UNFINISHED: max(older_than, 1.0)}
    return _delete(file for file in files if file.age >= least.get(file.kind, older_than) * DAY)


def limit_cache(folder: Path, limit: float) -> None:
    """Delete the tokenized texts that were not used for longest, until the others take at most `limit` bytes.

    Those used within the last day are kept, as a process may be about to open them. What is done is logged in one line.
    """
    files = [file for file in cached_files(folder) if file.kind == TOKENS]
    total, chosen = sum(file.size for file in files), []
    while files and total > limit and files[-1].age > DAY:
        chosen.append(files.pop())
        total -= chosen[-1].size
    if total > limit:
        log_once(
            log,
            logging.INFO,
            f"{folder}: the tokenized texts that were used within the last day take {format_bytes(total)}, above "
            "data.cache_gb, and are kept",
        )
    if not chosen:
        return
    count = f"{len(chosen)} file{'s' * (len(chosen) > 1)}"
    text = f"{count} of tokenized texts, not used for {chosen[-1].age / DAY:.0f} days or longer"
    try:
        freed = format_bytes(_delete(chosen))
    except OSError as error:
        log.warning("%s: can't be deleted to stay below data.cache_gb: %s (%s)", folder, text, error)
    else:
        log.info("%s: deleted to stay below data.cache_gb: %s (%s)", folder, text, freed)


def _delete(files: Iterable[CachedFile]) -> int:
    freed = 0
    for file in files:
        file.path.unlink(missing_ok=True)
        freed += file.size
    return freed
