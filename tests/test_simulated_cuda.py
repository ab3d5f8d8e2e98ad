"""Runs the tests of the simulated CUDA device, in a process that loads it before torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("path", sorted(HERE.glob("simulated_cuda/test_*.py")), ids=lambda path: path.stem)
def test_on_the_simulated_device(path: Path) -> None:
    plugins = ("-p", "tests.simulated_cuda.plugin", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", "-q", *plugins, str(path)]
    done = subprocess.run(command, cwd=HERE.parent, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
