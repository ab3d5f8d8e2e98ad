"""Loads what torch asks of CUDA; before torch, which looks for it when it is imported."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path


def load() -> None:
    """Compile `device.cpp` with g++, which takes two seconds, and load it into this process.

    Raises:
        RuntimeError: torch is there already.
        FileNotFoundError: there is no g++.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the simulated device has to be loaded before torch")
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    libraries = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "device.so")
        source = Path(__file__).with_name("device.cpp")
        command = [
            "g++",
            "-std=c++20",
            "-shared",
            "-fPIC",
            "-isystem",
            torch / "include",
            source,
            "-o",
            made,
            *libraries,
        ]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)
