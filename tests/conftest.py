from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """One thread and a fixed seed; the global random state is put back."""
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def unchanged_logging() -> Iterator[None]:
    """The program sets levels and a handler, which would print into later tests, or into a stream that is closed."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    loggers = [logging.getLogger(name) for name in ("", "lightning_bge", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)


@pytest.fixture(autouse=True, scope="session")
def quiet_lightning() -> None:
    """Lightning says which hardware it found each time a trainer is made."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The program, in this process."""
    from lightning_bge.cli import main as cli

    def call(*args: str) -> tuple[int, str, str]:
        """Exit status, standard output and standard error of the program."""
        monkeypatch.setattr(sys, "argv", ["lightning-bge", *args])
        capsys.readouterr()
        status = 0
        handlers = logging.getLogger().handlers[:]
        with warnings.catch_warnings():
            try:
                cli.main()
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 1
            finally:
                logging.getLogger().handlers[:] = handlers
        out, err = capsys.readouterr()
        return status, out, err

    return call
