from __future__ import annotations

import gc
import logging
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from lightning_bge.runtime.log_once import log_once


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """One thread and a fixed seed; the global random state is put back."""
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Frozen:
    """Whether the garbage collector leaves out what was there before a test."""

    now = False


@pytest.fixture(autouse=True, scope="session")
def noted_unfreeze() -> Iterator[None]:
    """The program freezes what is there while trials run, and unfreezes it afterwards."""
    original = gc.unfreeze

    def unfreeze() -> None:
        Frozen.now = False
        original()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", unfreeze)
        yield


@pytest.fixture(autouse=True)
def quick_collections(noted_unfreeze: None) -> None:
    """A collection would search all of pytest and the libraries, 0.2 s each time, and there are several in a trial."""
    if not Frozen.now:
        gc.collect()
        gc.freeze()
        Frozen.now = True


@pytest.fixture(autouse=True)
def logged_anew() -> None:
    """What is logged once a process is logged once a test."""
    log_once.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def levels() -> dict[str, int]:
    """The levels of the loggers that the program changes, as they are at first.

    Lightning's says nothing of which hardware it found, which it does each time a trainer is made.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    return {
        name: logging.getLogger(name).level for name in ("", "lightning_bge", "lightning.pytorch", "lightning.fabric")
    }


@pytest.fixture(autouse=True)
def unchanged_logging(levels: dict[str, int]) -> Iterator[None]:
    """The program sets levels and a handler, which would print into later tests, or into a stream that is closed.

    What a fixture of a module has left is put back too.
    """
    root = logging.getLogger()
    handlers = root.handlers[:]
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)


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
