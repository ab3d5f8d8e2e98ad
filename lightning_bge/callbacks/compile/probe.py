"""What compiling a layer costs and saves: one layer's calls of one real batch, replayed eager and compiled."""

import os
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bge.runtime.clock import wait_for
from lightning_bge.runtime.compat.torch import compiled_call, has_triton, set_compiled_call, tree_leaves, tree_map

ROUNDS = 5  # eager and compiled in turns; medians
REPEAT_S = 5.0  # between alarms: Python drops an exception that a signal handler raises in a destructor


class TimeLimitExceeded(BaseException):
    """The time limit is over. It is no `Exception`, as torch.compile turns some of these into its own."""


@dataclass(frozen=True)
class Measured:
    """What the probe measured, in seconds.

    Attributes:
        compile_s: to compile one layer, forward and backward.
        eager_s: one layer's calls of one Lightning batch, forward and backward.
        compiled_s: the same, compiled.
    """

    compile_s: float
    eager_s: float
    compiled_s: float


def missing_tool(device: torch.device, backend: str) -> str | None:
    """What inductor lacks to compile for a device; None: nothing, or it is another back end."""
    if backend != "inductor":
        return None
    if device.type == "cpu":
        compiler = os.environ.get("CXX", {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++"))
        return None if shutil.which(compiler) else f"there is no C++ compiler {compiler}: install it, or set CXX to one"
    if device.type != "cuda":
        return f"it is not measured on {device.type} yet"
    if not has_triton():
        return "there is no triton for this GPU: it comes with torch on Linux and needs compute capability 7.0"
    compilers = (os.environ.get("CC", ""), "clang", "gcc", "cc")
    if sys.platform != "win32" and not any(shutil.which(name) for name in compilers if name):
        return "there is no C compiler, which triton needs: install gcc"
    return None


class Capture:
    """Keeps the inputs of a layer's calls, detached, until it is closed.

    Args:
        layer: an eager one.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._autocast: dict[str, Any] = {}
        self._handle = layer.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append(tree_map(_detached, (args, kwargs)))
        device = next((leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), "cpu")
        self._autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }

    def close(self) -> None:
        """Take the hook away."""
        self._handle.remove()

    @property
    def device(self) -> torch.device:
        """The device of the layer's parameters; the CPU where it has none."""
        return next((p.device for p in self.layer.parameters()), torch.device("cpu"))

    def replay(self) -> None:
        """Repeat all calls, forward and backward, under the autocast of the captured ones; no `.grad` is changed."""
        with torch.enable_grad(), torch.autocast(**self._autocast):
            for call in self.calls:
                args, kwargs = call
                outputs = _with_grad(self.layer(*args, **kwargs))
                if outputs:
                    wanted = [*(p for p in self.layer.parameters() if p.requires_grad), *_with_grad(call)]
                    ones = [torch.ones_like(output) for output in outputs]
                    torch.autograd.grad(outputs, wanted, ones, allow_unused=True)


def _detached(leaf: Any) -> Any:
    return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _with_grad(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.requires_grad]


def measure(
    capture: Capture, compile_: Callable[[nn.Module], None], time_limit: float, clock: Callable[[], float]
) -> Measured:
    """Time a layer eager, compile it, time it compiled; it is eager again at the end, and nothing else has changed.

    Args:
        capture: the layer, and what it is called with.
        compile_: compiles a layer in place.
        time_limit: the most seconds for all of it.
        clock: seconds.

    Raises:
        TimeLimitExceeded: `time_limit` is over. torch then forgets all that it has compiled in this process, as it
            may be incomplete.
        ValueError: the layer was not called.
    """
    if not capture.calls:
        raise ValueError(
            f"{type(capture.layer).__name__} was not called in a training step: give CompileLayers other layers"
        )
    layer, finished = capture.layer, False
    devices = [capture.device] if capture.device.type == "cuda" else []
    buffers = [(buffer, buffer.clone()) for buffer in layer.buffers()]

    def timed() -> float:
        began = clock()
        capture.replay()
        wait_for(capture.device)
        return clock() - began

    try:
        with torch.random.fork_rng(devices), limit_time(time_limit):
            timed()  # warm-up
            eager, compiled = [timed()], []
            compile_(layer)
            call = compiled_call(layer)
            first = timed()
            timed()  # warm-up
            for _ in range(ROUNDS):
                set_compiled_call(layer, call)
                compiled.append(timed())
                set_compiled_call(layer, None)
                eager.append(timed())
        finished = True
    finally:
        set_compiled_call(layer, None)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        if not finished:
            torch.compiler.reset()
    median = statistics.median(compiled)
    return Measured(max(first - median, 0.0), statistics.median(eager), median)


def can_limit_time() -> bool:
    """Whether `limit_time` works here: in the main thread, where the system has timers."""
    return hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()


@contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Raise `TimeLimitExceeded` in the block when so many seconds are over; a timer that ran before is restored.

    In the main thread only. A call into C is interrupted when it returns.
    """
    armed = True

    def ring(*_: Any) -> None:
        if armed:
            raise TimeLimitExceeded

    handler = signal.signal(signal.SIGALRM, ring)
    began = time.monotonic()
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds, REPEAT_S)
    try:
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if remaining:
            signal.setitimer(signal.ITIMER_REAL, max(remaining - (time.monotonic() - began), 0.001), interval)
