"""The progress bar of a prediction: rows done of rows in all, rows per second, and the time left."""

import sys
import time

from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm  # type: ignore[import-untyped]

LINE_S = 10.0  # between two lines where the output is no terminal


class RowProgressBar(ProgressBar):
    """Rows done of rows in all, on standard error: a bar in a terminal, else a line every ten seconds.

    The host's clock is read and no device waited for: work that is queued up counts as done.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: tqdm | None = None
        self._total = self._first = self._done = 0
        self._start = self._printed = 0.0

    def disable(self) -> None:
        """Show nothing, as on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show it again."""
        self._enabled = True

    def start(self, total: int, done: int) -> None:
        """Begin.

        Args:
            total: rows in all.
            done: rows that an earlier run has predicted.
        """
        self._total, self._first, self._done = total, done, done
        self._start = self._printed = time.monotonic()
        if self._enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc="predicting", unit=" rows", file=sys.stderr)

    def move_to(self, done: int) -> None:
        """Show that so many rows are done."""
        self._done = done
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif self._enabled and time.monotonic() - self._printed > LINE_S:
            self._printed = time.monotonic()
            print(self.line(self._printed - self._start), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """The line after so many seconds."""
        rate = (self._done - self._first) / seconds
        left = f", {tqdm.format_interval((self._total - self._done) / rate)} left" if rate else ""
        return f"{self._done:,} of {self._total:,} rows, {rate:,.0f} rows/s{left}"

    def stop(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
