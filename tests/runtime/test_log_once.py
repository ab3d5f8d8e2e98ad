from __future__ import annotations

import logging

import pytest

from lightning_bge.runtime.log_once import log_once


def test_a_message_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("lightning_bge.test")
    for text in ("one", "one", "two", "one"):
        log_once(log, logging.WARNING, text)
    assert [record.message for record in caplog.records] == ["one", "two"]
