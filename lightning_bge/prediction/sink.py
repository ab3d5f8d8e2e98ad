"""Where predictions go: a draft that a later run continues and that becomes the file, or a device or a pipe."""

import hashlib
import json
import logging
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from lightning_bge.errors import ConfigError
from lightning_bge.prediction.formats import OutputFormat
from lightning_bge.runtime.output_file import open_stream, output_target
from lightning_bge.runtime.run_folder import read_json, write_json

log = logging.getLogger("lightning_bge")

DRAFT = ".lightning_bge_draft"  # the end of a draft's name; its state and its lock have one more ending
STALE_SECONDS = 7 * 86400


class Sink(Protocol):
    """Takes the bytes of one piece after the other.

    Attributes:
        is_kept: whether a later run can go on with what an interrupted one has written.
        pieces: number of pieces that it holds.
        rows: number of rows that it holds.
        reasons: how many of these have no score, by the reason.
    """

    is_kept: bool
    pieces: int
    rows: int
    reasons: Counter[str]

    def open(self, header: bytes) -> None:
        """Begin, with the header of an empty output, or go on."""

    def append(self, data: bytes, rows: int, reasons: Counter[str]) -> None:
        """Add a piece."""

    def complete(self) -> None:
        """Make the output of it."""

    def close(self) -> None:
        """Let others use it, complete or not."""


class StreamSink:
    """A device or a pipe, which is written to at once.

    Args:
        path: its name.
    """

    is_kept = False

    def __init__(self, path: str) -> None:
        self._path = path
        self.pieces, self.rows, self.reasons = 0, 0, Counter[str]()

    def open(self, header: bytes) -> None:
        """Open it; a pipe waits for its reader."""
        self._file = open_stream(self._path)
        self._file.write(header)

    def append(self, data: bytes, rows: int, reasons: Counter[str]) -> None:
        """Write a piece."""
        self._file.write(data)
        self._file.flush()
        self.pieces, self.rows, self.reasons = self.pieces + 1, self.rows + rows, self.reasons + reasons

    def complete(self) -> None:
        """Nothing is left to be done."""

    def close(self) -> None:
        """Close it; what the reader has not taken may be lost where it has gone."""
        try:
            self._file.close()
        except BrokenPipeError:
            log.debug("the reader of %s has gone", self._path)


class DraftSink:
    """A hidden file beside the output. After a kill the next run with the same key goes on with it.

    Args:
        path: the output, which is replaced when all is done.
        form: its format.
        key: all that the rows depend on, as plain data. A draft of another key is started anew.
    """

    is_kept = True

    def __init__(self, path: str, form: OutputFormat, key: dict[str, Any]) -> None:
        self._form, self._target = form, output_target(path)
        self._key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        name = os.fsencode(self._target.name)[:100].decode(errors="ignore")  # a name may have 255 bytes
        self._draft = self._target.with_name(f".{name}{DRAFT}")
        self._state = self._draft.with_name(f"{self._draft.name}.json")
        self._lock = FileLock(f"{self._draft}.lock", mode=0o600)
        self.pieces, self.rows, self.reasons = 0, 0, Counter[str]()

    def open(self, header: bytes) -> None:
        """Continue with the draft of the same key, or start a new one.

        Raises:
            ConfigError: another process writes this output.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"output: another process is writing {self._target}. Wait for it, or name another file"
            ) from None
        _remove_stale(self._target.parent, self._draft)
        for part in self._target.parent.iterdir():
            if part.name.startswith(f".{self._state.name}-"):  # a state that was being written when a run was killed
                part.unlink(missing_ok=True)
        state = read_json(self._state) if self._draft.is_file() else None
        if state is not None and state["key"] == self._key and state["bytes"] <= self._draft.stat().st_size:
            self.pieces, self.rows, self.reasons = state["pieces"], state["rows"], Counter(state["reasons"])
            os.truncate(self._draft, state["bytes"])  # what follows was written in part
            self._file = self._draft.open("ab")
            log.info("%s: going on after %s rows that an earlier run has predicted", self._target, f"{self.rows:,}")
            return
        if state is not None:
            log.warning("%s: an earlier run stopped with another model, file or option; starting anew", self._target)
        self._draft.unlink(missing_ok=True)
        self._state.unlink(missing_ok=True)
        self._draft.touch(0o600)  # private until it is the output
        self._file = self._draft.open("wb")
        self._file.write(header)

    def append(self, data: bytes, rows: int, reasons: Counter[str]) -> None:
        """Write a piece, and then note that it is there."""
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.pieces, self.rows, self.reasons = self.pieces + 1, self.rows + rows, self.reasons + reasons
        state = {"key": self._key, "bytes": self._file.tell(), "pieces": self.pieces, "rows": self.rows}
        write_json(self._state, {**state, "reasons": dict(self.reasons)})

    def complete(self) -> None:
        """Make the output of the draft, and remove it."""
        self._file.close()
        self._form.complete(self._draft, self._target)
        self._state.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process write this output; a draft without a row is removed."""
        if self._lock.is_locked:
            self._file.close()
            if not self.pieces:
                self._draft.unlink(missing_ok=True)
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()


def _remove_stale(folder: Path, own: Path) -> None:
    """Delete the drafts of runs that nobody has continued for a week."""
    for draft in folder.glob(f".*{DRAFT}*"):
        try:
            if not draft.name.startswith(own.name) and time.time() - draft.stat().st_mtime > STALE_SECONDS:
                draft.unlink()
        except FileNotFoundError:
            continue  # another process was faster
