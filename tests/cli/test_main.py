"""Finding the command, before anything slow is imported."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from lightning_bge.cli.explain import explain
from lightning_bge.cli.main import COMMANDS, describe_commands
from tests.helpers.paths import ROOT

SLOW = ("torch", "lightning", "transformers", "optuna", "sklearn", "plotly", "pyarrow")


def program(*args: str) -> tuple[int, str, str, list[str]]:
    """Exit status, output, errors and the slow packages that were imported, of the program in a process of its own."""
    code = (
        "import atexit, sys; from lightning_bge.cli.main import main; atexit.register(lambda: print([name for name in "
    )
    code += f"{SLOW} if name in sys.modules])); main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    *out, slow = done.stdout.splitlines()
    return done.returncode, "\n".join(out), done.stderr, eval(slow)


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--help"], 0, "usage: lightning-bge COMMAND"),
        ([], 0, "usage: lightning-bge COMMAND"),
        (["--version"], 0, "lightning-bge 0."),
        (["hop"], 2, "Did you mean hpo?"),
        (["frobnicate"], 2, "`lightning-bge --help` lists the commands"),
        (["hpo", "-c", "nowhere.yaml"], 2, "nowhere.yaml does not exist"),
        (["fit", "--data.train_file", "nowhere.csv"], 2, "data.train_file: nowhere.csv does not exist"),
        (["predict", "--data.predict_file=nowhere.csv"], 2, "data.predict_file: nowhere.csv does not exist"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_help_unknown_commands_and_missing_files_import_nothing_slow(
    args: list[str], status: int, message: str
) -> None:
    found, out, err, slow = program(*args)
    assert found == status
    assert message in out + err
    assert "Traceback" not in err
    assert slow == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_line_in_the_help_and_a_help_of_its_own(
    run: Callable[..., tuple[int, str, str]], command: str
) -> None:
    assert f"\n  {command} " in describe_commands()
    status, out, _ = run(command, "--help")
    assert status == 0
    assert f"usage: lightning-bge {command}" in out


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EROFS, "a.csv can't be written (Read-only file system)"),
        (errno.EACCES, "a.csv can't be opened (Permission denied)"),
        (errno.EPERM, "a.csv can't be opened (Operation not permitted)"),
    ],
)
def test_a_file_that_can_not_be_used_is_named(number: int, said: str) -> None:
    text = explain(OSError(number, os.strerror(number), "a.csv"))
    assert text is not None
    assert text.startswith(said)
