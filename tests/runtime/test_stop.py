"""`StopRequest`: what a process does after a signal."""

import logging
import os
import signal

import pytest

from lightning_bge.errors import StudyError
from lightning_bge.runtime.stop import StopRequest


def stopped_with(number: int, error: Exception) -> None:
    with StopRequest():
        os.kill(os.getpid(), number)
        raise error


def test_the_status_is_that_of_the_signal() -> None:
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGTERM)
    assert request.signal == signal.SIGTERM
    with pytest.raises(SystemExit) as ended:
        request.leave()
    assert ended.value.code == 143


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_an_error_while_all_is_saved_is_logged_and_the_signal_decides(
    number: int, expected: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(expected):
        stopped_with(number, StudyError("the database has not answered for 10 s"))
    assert [(one.levelno, one.getMessage()) for one in caplog.records] == [
        (logging.ERROR, "the database has not answered for 10 s")
    ]


def test_an_error_without_a_signal_and_a_defect_are_raised() -> None:
    with pytest.raises(StudyError, match="wrong"), StopRequest():
        raise StudyError("wrong")
    with pytest.raises(ZeroDivisionError):
        stopped_with(signal.SIGTERM, ZeroDivisionError())
