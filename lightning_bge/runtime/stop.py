"""Stopping on request: after a signal the work goes on to the next point at which it can be saved."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from lightning_bge.errors import UserError

log = logging.getLogger("lightning_bge")

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopRequest:
    """While it is entered, Ctrl-C, SIGTERM and SIGHUP ask for a stop; a second Ctrl-C raises KeyboardInterrupt.

    Outside of the main thread, where Python cannot handle signals, nothing changes. An error that the user can fix,
    such as a database that is away when all is to be saved, is logged after a signal, and the process ends as the
    signal asks for.

    Args:
        parent: the process without which this one is to stop as well; None: it has none.
    """

    def __init__(self, parent: int | None = None) -> None:
        self._parent, self._received = parent, 0
        self._former: dict[int, Any] = {}

    @property
    def signal(self) -> int:
        """The signal that asked for a stop, SIGTERM where the parent is gone; 0: none."""
        if not self._received and self._parent is not None and os.getppid() != self._parent:
            self._received = signal.SIGTERM
        return self._received

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as with nohup
                    self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self._received and isinstance(error, UserError):
            log.error("%s", error)
            self.leave()

    def leave(self) -> None:
        """End the process as the signal asks for; return where none has come.

        Raises:
            KeyboardInterrupt: it was Ctrl-C.
            SystemExit: with the status 128 + the signal's number.
        """
        if self._received == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received:
            raise SystemExit(128 + self._received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received:
            return
        self._received = number  # before the text, which may be read and answered while it is still being printed
        again = "; Ctrl-C once more stops at once" if number == signal.SIGINT else ""
        with suppress(RuntimeError):  # the signal came in the middle of another write to this stream
            print(f"{signal.Signals(number).name}: saving what is being trained{again}", file=sys.stderr, flush=True)


class Stopped(Exception):
    """Training was stopped on request, and saved."""
