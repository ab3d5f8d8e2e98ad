"""Whether the batch size that `MicroBatchFinder` answers holds: trained under several memory limits, a process each.

A fresh process each, as what torch's allocator keeps would disturb the next one. It is called by `gpu_suite.py`:
`--parts memory`.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_parts import MAX_LENGTH, Bench, Limit, labels_of, make_rows
from lightning.pytorch import Callback, LightningDataModule

from lightning_bge.callbacks.micro_batch.config import MemoryConfig
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.data.batches.config import EVAL_FACTOR
from lightning_bge.data.batches.micro_batches import EncodedDataset
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder import quiet_transformers
from lightning_bge.runtime.memory import process_bytes
from lightning_bge.trainer import quiet_trainer
from lightning_bge.types import Batch, Schema

# Shares of the GPU that a process may fill. The larger model's weights, gradients and AdamW take 9 GiB.
FRACTIONS = {"bge-base-en-v1.5": (0.06, 0.12, 0.25, 0.5), "bge-reranker-v2-m3": (0.1, 0.15, 0.25, 0.5)}
TOO_LARGE = 2  # times the size found: far beyond the margin and what fragments of the heap can hide on a CPU
TINY_ROOM = 300 * 2**20  # bytes of address space beyond what the imports take, in the tiny form on a CPU
TIMEOUT_S = 300


@dataclass(frozen=True)
class Task:
    """What one process does: a micro-batch size is searched at a limit, and trained with so many times."""

    model: str
    folder: str
    device: str
    fraction: float
    runs: int
    tiny: bool
    seed: int


class WorstCases(LightningDataModule):
    """Batches of the size found, all sequences as long as they can get: some that must fit, one that must not."""

    micro_batch_size_step = MAX_LENGTH

    def __init__(self, task: Task) -> None:
        super().__init__()
        bench = Bench(task.device, Path(task.folder), Limit(1, 1, 1.0), task.tiny, task.seed)
        rows = make_rows(bench.shape(task.model), np.full(8, MAX_LENGTH), task.seed)
        self.dataset = EncodedDataset(rows, labels_of(len(rows)), None, MAX_LENGTH)
        self.schema, self.class_counts = Schema("binary", ("no", "yes"), ("first", "second"), MAX_LENGTH), None
        self.runs, self.micro_batch_size, self.factor = task.runs, MAX_LENGTH, 1.0

    def worst_case_batch(self, micro_batch_size: int, train: bool) -> Batch:
        """One micro-batch, rounded up to whole sequences."""
        tokens = micro_batch_size if train else EVAL_FACTOR * micro_batch_size
        return self.dataset.worst_case(-(-tokens // MAX_LENGTH), MAX_LENGTH)

    def set_micro_batch_size(self, size: int) -> None:
        """Make batches of that size."""
        self.micro_batch_size = size

    def train_dataloader(self) -> Source:
        """`runs` batches of the size found and a larger one."""
        return Source(self, train=True)

    def val_dataloader(self) -> Source:
        """One batch, in the measure of the training batch before it."""
        return Source(self, train=False)


class Source:
    """Batches made when they are asked for, as their size is known then."""

    def __init__(self, data: WorstCases, train: bool) -> None:
        self.data, self.train = data, train

    def __len__(self) -> int:
        return self.data.runs + 1 if self.train else 1

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            if self.train:
                self.data.factor = TOO_LARGE if number == self.data.runs else 1.0
            yield self.data.worst_case_batch(round(self.data.micro_batch_size * self.data.factor), self.train)


class Watch(Callback):
    """Which steps ran out of memory, training and the validation after it taken together.

    The module repeats such a step with less memory, and the size is reset before the next one: each is judged alone.
    """

    def __init__(self, runs: int) -> None:
        self.runs, self.began = runs, time.perf_counter()
        self.search_s, self.size = 0.0, 0
        self.failed: list[bool] = []
        self.peak: int | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The finder is done."""
        self.search_s = time.perf_counter() - self.began
        self.size = trainer.datamodule.micro_batch_size
        if pl_module.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Forget what the step before taught."""
        if batch_idx == self.runs and pl_module.device.type == "cuda":
            self.peak = torch.cuda.max_memory_reserved()
        pl_module.oom_retry.reset()
        trainer.datamodule.set_micro_batch_size(self.size)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Both parts of the step are over."""
        self.failed.append(bool(pl_module.oom_retry.records))


class Timer(Callback):
    """Starts the clock before the finder, which begins in the same hook."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.watch.began = time.perf_counter()


def limit_memory(task: Task) -> None:
    """Bind this process, which ends soon after, to its share; on a CPU to some address space."""
    if task.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(task.fraction)
    else:
        import resource  # not there on Windows

        torch.set_num_threads(1)  # each thread would take address space of its own
        most = process_bytes()["VmSize"] + TINY_ROOM
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def try_out(task: Task) -> dict[str, Any]:
    """Find a micro-batch size at the task's limit, train and validate with it, and with too large a one."""
    data, watch = WorstCases(task), Watch(task.runs)
    finder = MicroBatchFinder(MemoryConfig(min_speedup=None, cache=False))
    with quiet_transformers():
        module = BGEClassifier(str(Path(task.folder) / task.model))
        module.set_schema(data.schema)
        module.configure_model()
    limit_memory(task)
    settings = {"max_epochs": 1, "precision": "bf16-mixed", "accelerator": task.device}
    trainer = quiet_trainer(
        {**settings, "callbacks": [Timer(watch), finder, watch]}, val_check_interval=1, limit_val_batches=1
    )
    trainer.fit(module, datamodule=data)
    return {
        "fraction": task.fraction,
        "micro_batch_size": finder.micro_batch_size,
        "reason": finder.reason,
        "search_s": watch.search_s,
        "tries": len(finder.tried),
        "peak_gib": None if watch.peak is None else watch.peak / 2**30,
        "runs": task.runs,
        "failed_runs": sum(watch.failed[: task.runs]),
        "larger_failed": watch.failed[task.runs],
    }


def measure_memory(suite: Any, model: str) -> dict[str, Any]:
    """Each limit in a process of its own; an answer that does not hold is a failure of the suite."""
    bench: Bench = suite.bench
    bench.model_folder(model)
    gc.collect()
    if bench.device == "cuda":
        torch.cuda.empty_cache()  # the other process needs it
    task = Task(model, str(bench.folder), bench.device, 1.0, 2 if bench.tiny else 20, bench.tiny, bench.seed)
    fractions = FRACTIONS[model][-1:] if bench.tiny else FRACTIONS[model]
    found: list[dict[str, Any]] = []
    for fraction in fractions:
        what = f"memory {model}: {fraction:.0%}"
        if suite.left() <= 0:
            suite.skip(what, "the time was over")
            continue
        try:
            entry = run_alone(replace(task, fraction=fraction))
            found.append(entry)
            check(entry)
        except Exception as error:
            suite.fail(what, error)
            continue
        print(f"{what}: {entry['micro_batch_size']} tokens, found in {entry['search_s']:.1f} s, holds", flush=True)
    return {"limits": found}


def check(entry: dict[str, Any]) -> None:
    """Whether the answer holds, and is not much too small.

    Raises:
        RuntimeError: it does not, or is.
    """
    if entry["failed_runs"] or not entry["larger_failed"]:
        larger = "did not fit" if entry["larger_failed"] else "fitted too"
        raise RuntimeError(
            f"at {entry['micro_batch_size']} tokens {entry['failed_runs']} of {entry['runs']} steps ran out of memory; "
            f"{TOO_LARGE} times as many {larger}"
        )


def run_alone(task: Task) -> dict[str, Any]:
    """`try_out` in a fresh process.

    Raises:
        RuntimeError: it failed; its last line of words is in the message.
    """
    command = [sys.executable, __file__, json.dumps(asdict(task))]
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if task.device == "cpu":
        # oneDNN keeps about 10 MiB of code for each new shape in bf16, much beside the tiny room
        environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "0"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        last = next(reversed(done.stderr.strip().splitlines()), "no message")
        raise RuntimeError(f"exit status {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(try_out(Task(**json.loads(sys.argv[1])))))
