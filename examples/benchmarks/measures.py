"""What is measured of a run: time inside the loop, floating-point operations, peak memory, the machine's peak."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback
from transformers import AutoConfig, AutoModelForSequenceClassification, TrainerCallback

Run = dict[str, Any]
# Shapes (m, k, n) of the matrix products that the machine's peak is looked for among.
PEAK_SHAPES = {
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 4096)),
}
SLOW_S = 2.0  # a product that takes longer is timed once
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

DEFINITIONS = """\
- **samples/s, real tokens/s**: pairs, and their tokens without padding, over the seconds of the training loop.
- **utilization**: model FLOPs over the seconds of the loop, over the machine's peak. Model FLOPs = 6 x parameters x
  real tokens + 12 x layers x hidden size x sum of squared lengths (PaLM, appendix B, arXiv:2204.02311). Parameters are
  those of the encoder's layers and of the head; embeddings are not counted. Padding is not counted as work; what a
  contender leaves out because nothing reads it (lightning-bge: most of the last layer) is counted.
- **peak**: the fastest of a few big `torch.mm`, median of several calls each, in the dtype that the contender
  multiplies in, with as many threads; measured in the same run, at the start of each round, in a process of its own.
- **peak memory**: on a CPU the largest resident size of the contender's process, with Python, the libraries and
  mapped files in it; on a GPU `torch.cuda.max_memory_allocated`."""


def wait_for_device() -> None:
    """Wait until the GPU, if any, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clock:
    """Time and work of one training loop; the device is waited for at both ends."""

    def __init__(self) -> None:
        self.seconds = self.since = 0.0
        self.sequences = self.tokens = self.squares = 0

    def start(self) -> None:
        wait_for_device()
        self.since = time.perf_counter()

    def stop(self) -> None:
        wait_for_device()
        self.seconds += time.perf_counter() - self.since

    def count(self, lengths: list[int] | tuple[int, ...]) -> None:
        """Add sequences of these lengths in real tokens."""
        self.sequences += len(lengths)
        self.tokens += sum(lengths)
        self.squares += sum(length * length for length in lengths)


class LightningClock(Callback):
    """Drives a clock in Lightning. Batches of ours are counted as they are trained on; others beforehand."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.clock.start()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for micro in getattr(batch, "micro", ()):
            self.clock.count(micro.lengths)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.clock.stop()


class TransformersClock(TrainerCallback):
    """Drives a clock in transformers' Trainer."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.start()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.stop()


def timed(clock: Clock, train: Callable[[], Any], config: dict[str, Any], dtype: str) -> Run:
    """Call `train`, and report rates over the loop.

    Args:
        clock: is driven within `train`.
        train: the call of `fit` or `train`.
        config: the contender's settings, for the record.
        dtype: bf16 or fp32, what matrices are multiplied in.
    """
    gc.collect()
    wait_for_device()
    since = time.perf_counter()
    train()
    wait_for_device()
    return {
        "loop_seconds": clock.seconds,
        "call_seconds": time.perf_counter() - since,
        "sequences": clock.sequences,
        "tokens": clock.tokens,
        "length_squares": clock.squares,
        "samples_per_s": clock.sequences / clock.seconds,
        "tokens_per_s": clock.tokens / clock.seconds,
        "dtype": dtype,
        "config": config,
    }


class StepClock:
    """Seconds inside training steps and inside validation, and how many steps and validations there were."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.first_steps: list[float] = []  # when each trial's first training step started, seconds since 1970
        self.training = self.validation = 0.0
        self.steps = self.validations = 0
        self._since = 0.0

    def start(self) -> None:
        wait_for_device()
        self._since = time.perf_counter()

    def stop_step(self) -> None:
        wait_for_device()
        self.training += time.perf_counter() - self._since
        self.steps += 1

    def stop_validation(self) -> None:
        wait_for_device()
        self.validation += time.perf_counter() - self._since
        self.validations += 1

    @contextmanager
    def validating(self) -> Iterator[None]:
        self.start()
        yield
        self.stop_validation()


def values_of(runs: list[Run], name: str, field: str) -> list[float]:
    """A figure of a contender, round by round."""
    return [run[field] for run in runs if run["contender"] == name]


def medians_of(runs: list[Run], names: list[str], fields: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """The figures of each contender, medians over the rounds."""
    return {name: {field: median(values_of(runs, name, field)) for field in fields} for name in names}


def ratio_of(above: list[float], below: list[float], strict: bool = True) -> dict[str, Any]:
    """One contender's figure over another's: of the medians, and round by round.

    Args:
        above: round by round, the numerator.
        below: the denominator.
        strict: both must have had as many rounds; else only rounds that both had are compared one by one.
    """
    return {
        "of_medians": median(above) / median(below),
        "by_round": [a / b for a, b in zip(above, below, strict=strict)],
    }


def model_shape(folder: str) -> dict[str, int]:
    """Parameters outside of the embeddings (head of one output included), layers and hidden size of a model."""
    config = AutoConfig.from_pretrained(folder, num_labels=1)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    counted = [p.numel() for name, p in model.named_parameters() if "embeddings" not in name.split(".")]
    return {"parameters": sum(counted), "layers": config.num_hidden_layers, "hidden": config.hidden_size}


def model_flops(shape: dict[str, int], tokens: int, length_squares: int) -> int:
    """FLOPs of training on real tokens, forward and backward: see `DEFINITIONS`."""
    return 6 * shape["parameters"] * tokens + 12 * shape["layers"] * shape["hidden"] * length_squares


def matmul_peak(device: str, repeats: int = 5) -> dict[str, float]:
    """FLOP/s of the fastest big matrix product in bf16 and in fp32, the median of `repeats` calls each."""

    def seconds(a: torch.Tensor, b: torch.Tensor) -> float:
        wait_for_device()
        since = time.perf_counter()
        torch.mm(a, b)
        wait_for_device()
        return time.perf_counter() - since

    found = {}
    for name, dtype in DTYPES.items():
        rates = []
        for m, k, n in PEAK_SHAPES[device]:
            if rates and 2 * m * k * n / rates[-1] > SLOW_S:
                break  # emulated bf16 takes minutes, and is no faster in a larger product
            a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
            first = seconds(a, b)
            rates.append(2 * m * k * n / (first if first > SLOW_S else median(seconds(a, b) for _ in range(repeats))))
        found[name] = max(rates)
    return found


def peak_memory_mib() -> float:
    """Peak memory of this process (CPU: resident size) or of its tensors on the GPU, MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        # not getrusage's ru_maxrss, which a process takes over from the one that started it
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def fresh(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a process of its own, so that no run finds what another one left behind."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
