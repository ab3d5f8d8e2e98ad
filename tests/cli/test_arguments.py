"""Arguments of the commands that train nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_bge.errors import PIPE_CLOSED

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["status"], "the following arguments are required: run. See `lightning-bge status --help`"),
        (["status", "a", "--wacth", "3"], "there is no option --wacth. Did you mean --watch?"),
        (["status", "a", "--watch", "x"], "--watch: invalid float value: 'x'. See `lightning-bge status --help`"),
        (["status", "a", "b"], "got 'b'"),
        (["report"], "the following arguments are required: run"),
        (["report", "a", "--frobnicate"], "there is no option --frobnicate. `lightning-bge report --help` lists"),
        (["worker", "a", "--timeot", "3"], "Did you mean --timeout?"),
        (["worker", "a", "--share"], "--share: expected one argument"),
        (["sample"], "the following arguments are required: folder"),
        (["sample", "a", "--seed", "x"], "--seed: invalid int value: 'x'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_has_one_line(run: Run, args: list[str], message: str) -> None:
    status, out, err = run(*args)
    assert status == 2
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("folder", ["file", "file/x"])
def test_a_sample_needs_a_folder(run: Run, tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    status, _, err = run("sample", str(tmp_path / folder))
    assert status == 2
    assert "folder: " in err
    assert "where a folder is needed" in err


def test_a_reader_that_ends_early_ends_the_program_quietly(tmp_path: Path) -> None:
    """What `lightning-bge status RUN | head -1` does: nobody reads standard output any more."""
    code = "import time, types, sys; from lightning_bge.cli import main\n"
    code += "def run(args): print('x' * 100_000)\n"
    code += "main.importlib.import_module = lambda name: types.SimpleNamespace(run=run)\n"
    code += "main.main(['status', 'folder'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(60) == PIPE_CLOSED
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.parametrize("command", ["status", "report", "worker", "dashboard"])
def test_a_url_in_the_place_of_a_run_is_not_repeated(command: str, run: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = run(command, "postgresql+psycopg://me:s3cr3t@host/studies")
    assert (status, out) == (2, "")
    assert "s3cr3t" not in err
    assert "RUN: expected a run's folder, got a URL" in err
    assert "--storage" in err
