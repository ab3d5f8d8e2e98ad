"""Runs tests on the simulated CUDA device, in processes that load it before torch: its own, and those for a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Tests for a GPU of which the simulation has all that they ask; the others time kernels, compile for triton, or fill a
# gigabyte of memory, which takes a CPU minutes.
FOR_A_GPU = (
    "models/attention/test_cuda.py",
    "models/test_effective_batch.py",
    "models/test_encoder_cache_several.py",
    "models/test_loss_scaling.py",
    "models/memory_saving/test_gradient_checkpointing.py",
)
QUICK = ("test_choices", "test_device")
COMPILED = "recomputed and True"  # torch.compile does not take the simulation's tensors

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def run(*arguments: str) -> None:
    """Run pytest with the device; nothing may fail or be skipped."""
    plugins = ("-p", "tests.simulated_cuda.plugin", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", "-q", *plugins, *arguments]
    done = subprocess.run(command, cwd=HERE.parent, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("name", QUICK)
def test_its_own_tests(name: str) -> None:
    run(str(HERE / "simulated_cuda" / f"{name}.py"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted(path.stem for path in HERE.glob("simulated_cuda/test_*.py") if path.stem not in QUICK)
)
def test_its_own_tests_that_take_long(name: str) -> None:
    run(str(HERE / "simulated_cuda" / f"{name}.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FOR_A_GPU)
def test_those_for_a_gpu(name: str) -> None:
    run("-m", "gpu", "-k", f"not ({COMPILED})", str(HERE / name))
