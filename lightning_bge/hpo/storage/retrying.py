"""A storage whose calls wait while its database, or the proxy in front of it, does not answer."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.errors import StudyError, first_line

log = logging.getLogger("lightning_bge")

FIRST_SECONDS, MOST_SECONDS = 0.1, 5.0  # between two tries; doubled each time
SLOW_SECONDS = 2.0  # a call that takes longer has waited for an outage, if only at the other end of a proxy
# For which a list of complete trials serves; longer where reading it takes more than this part of that: hundreds of
# workers that read the trials of each other would keep a storage busy with nothing else.
COMPLETE_SECONDS, MOST_COMPLETE_SECONDS, READING = 1.0, 30.0, 0.01
STOPPING_SECONDS = 10.0  # what a process that is to stop still waits, in all; and a call after one that was given up
SLEEP_SECONDS = 0.5  # after which a process that waits looks whether it is to stop
HAS_NOT_ANSWERED = "has not answered for"
UNAVAILABLE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")  # status of a proxy that does not answer
Found = TypeVar("Found")


def reason_of_outage(error: BaseException) -> str | None:
    """Why a storage does not answer, in one line; None: the error is another one, which would come again.

    A refused login is such a one.
    """
    from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, PendingRollbackError, TimeoutError

    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(cause, PendingRollbackError):  # Optuna has caught the first error, and gone on in the transaction
        cause = cause.__context__ or cause.__cause__
    if isinstance(cause, OperationalError | InterfaceError) or (
        isinstance(cause, DBAPIError) and cause.connection_invalidated
    ):
        return None if is_refusal(str(cause)) else first_line(cause.orig)
    if isinstance(cause, TimeoutError):  # all connections of the pool are in use
        return first_line(cause)
    if (
        cause is not None and hasattr(cause, "code") and hasattr(cause, "details")
    ):  # of grpc.RpcError, which may not be installed
        status, details = cause.code().name, str(cause.details())
        if status in UNAVAILABLE:
            return first_line(details)
        marks = ("OperationalError", "StorageInternalError", HAS_NOT_ANSWERED)  # the last is of its own `Retries`
        if status == "UNKNOWN" and any(mark in details for mark in marks):
            return "the proxy's database does not answer"
    return None


def is_refusal(text: str) -> bool:
    """Whether a database answers, and refuses the login, as it will again."""
    marks = ("authentication failed", "no password supplied", "no pg_hba.conf entry", "Access denied", "does not exist")
    return any(mark in text for mark in (*marks, "Unknown database"))


class Retries:
    """Makes a call again and again while what it needs does not answer.

    Args:
        name: of the storage, for messages.
        seconds: for which a call is tried again.

    Attributes:
        last_outage: `time.monotonic()` when a call last failed, or had to wait.
        is_stopping: whether the process is to stop: all calls together then wait for a few seconds only.
    """

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self.last_outage = -float("inf")
        self.is_stopping: Callable[[], object] = lambda: False
        self._warned, self._has_given_up = threading.Event(), False
        self._stop_by: float | None = None

    def call(self, function: Callable[..., Found], *args: Any, **options: Any) -> Found:
        """Call a function until the storage answers.

        Raises:
            StudyError: it did not answer for `seconds`, or for a few where the process is to stop.
        """
        since, wait = time.monotonic(), FIRST_SECONDS
        while True:
            try:
                found = function(*args, **options)
            except Exception as error:
                reason = reason_of_outage(error)
                if reason is None or self.seconds == 0:
                    raise
                self.last_outage = time.monotonic()
                wait = self._wait(reason, self.last_outage - since, wait)
            else:
                if time.monotonic() - since > SLOW_SECONDS:
                    self.last_outage = time.monotonic()
                self._has_given_up = False
                if self._warned.is_set():
                    self._warned.clear()
                    log.warning("%s answers again", self.name)
                return found

    def _wait(self, reason: str, elapsed: float, wait: float) -> float:
        """Sleep until the next try; returns the seconds to sleep after it."""
        left = self._seconds_left(elapsed)
        if left <= 0:
            self._has_given_up = True
            raise StudyError(
                f"{self.name} {HAS_NOT_ANSWERED} {elapsed:.0f} s: {reason}. What was saved is continued when the "
                "same command is run again"
            ) from None
        if not self._warned.is_set():
            self._warned.set()
            log.warning("%s does not answer: %s. Trying again for up to %.0f s", self.name, reason, self.seconds)
        until = time.monotonic() + min(wait * random.uniform(0.5, 1.0), left)
        while (rest := until - time.monotonic()) > 0 and self._seconds_left(elapsed) > 0:
            time.sleep(min(rest, SLEEP_SECONDS))
        return min(2 * wait, MOST_SECONDS)

    def _seconds_left(self, elapsed: float) -> float:
        """For which a call that has waited so many may wait on."""
        now = time.monotonic()
        if self._stop_by is None and self.is_stopping():
            self._stop_by = now + STOPPING_SECONDS
        # what is still to be written need not wait as long once more
        left = (min(self.seconds, STOPPING_SECONDS) if self._has_given_up else self.seconds) - elapsed
        return left if self._stop_by is None else min(left, self._stop_by - now)


def _passed_on(name: str) -> Callable[..., Any]:
    def method(self: RetryingStorage, *args: Any, **options: Any) -> Any:
        return self.retries.call(getattr(self.inner, name), *args, **options)

    method.__name__, method.__doc__ = name, getattr(BaseStorage, name).__doc__
    return method


_NAMES = [name for name, value in vars(BaseStorage).items() if callable(value) and not name.startswith("_")]
_PassesOn: Any = type("_PassesOn", (BaseStorage,), {name: _passed_on(name) for name in _NAMES})


class RetryingStorage(_PassesOn):
    """Passes all calls on to another storage, again and again while that one does not answer.

    A write whose answer was lost may have been made. One that sets a state is not an error then; a trial that was
    created twice is found by `end_lost_trials`.

    Args:
        inner: the other storage.
        retries: how long, and what is said meanwhile.
    """

    def __init__(self, inner: BaseStorage, retries: Retries) -> None:
        self.inner, self.retries = inner, retries
        self._complete: dict[int, tuple[float, list[FrozenTrial]]] = {}
        self._recent = threading.local()

    @contextmanager
    def recent_is_enough(self) -> Iterator[None]:
        """In the `with` block complete trials that are read without any others may be missing for a second.

        Where the storage is slow, for 100 times as long as it takes to read them, and at most for 30 seconds.
        """
        self._recent.is_enough = True
        try:
            yield
        finally:
            self._recent.is_enough = False

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """As Optuna's; see `recent_is_enough`."""
        now = time.monotonic()
        if states == (TrialState.COMPLETE,) and not deepcopy and getattr(self._recent, "is_enough", False):
            until, found = self._complete.get(study_id, (-math.inf, []))
            if now <= until:
                return found
        found = self.retries.call(self.inner.get_all_trials, study_id, deepcopy=deepcopy, states=states)
        if not deepcopy and (states is None or TrialState.COMPLETE in states):
            seconds = min(max(COMPLETE_SECONDS, (time.monotonic() - now) / READING), MOST_COMPLETE_SECONDS)
            self._complete[study_id] = now + seconds, [t for t in found if t.state == TrialState.COMPLETE]
        return found

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        """As Optuna's; where the answer to an earlier try was lost, its effect is no error."""
        tries = 0
        self._complete.clear()

        def call() -> bool:
            nonlocal tries
            tries += 1
            try:
                return self.inner.set_trial_state_values(trial_id, state, values)
            except UpdateFinishedTrialError:
                if tries > 1 and self.inner.get_trial(trial_id).state == state:
                    return True
                raise

        return self.retries.call(call)


class RecentTrialsPruner(BasePruner):
    """Lets a pruner compare with the trials that were complete a second ago, or a little more: see `recent_is_enough`.

    Optuna's read all complete trials at each report, for which a database has to answer half a dozen queries: most of
    what a trial with many reports costs there.

    Args:
        inner: the pruner.
        storage: of the study.
    """

    def __init__(self, inner: BasePruner, storage: RetryingStorage) -> None:
        self.inner, self._storage = inner, storage

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether to stop the trial at its last step."""
        with self._storage.recent_is_enough():
            return self.inner.prune(study, trial)
