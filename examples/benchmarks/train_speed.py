"""Training speed: lightning-bge against transformers' Trainer, one epoch over RTE, effective batch 32.

    pip install -r examples/benchmarks/requirements.txt
    python examples/benchmarks/train_speed.py --data FOLDER            # FOLDER/rte/train.tsv
    python examples/benchmarks/train_speed.py --data FOLDER --peers all

The contenders take turns (A B C A B C ...), each run in a fresh process: it loads weights, tokenises, trains a few
steps on a copy to warm up, then trains one epoch from fresh weights. `loop_seconds`, from which all rates come, is
the time from the epoch's start to its end: fetching and padding batches, forward, backward, clipping, optimizer
step, with the device waited for at both ends. Loading and tokenising lie outside, except for sentence-transformers,
whose collator tokenises during training. `call_seconds` is the whole call of `fit` or `train`. Number of threads:
OMP_NUM_THREADS, the same for all. Give the machine nothing else to do meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import (
    Job,
    add_shared_arguments,
    build_ours,
    build_trainer,
    check_shared_arguments,
    describe_ours,
    describe_trainer,
    encode,
    print_table,
    write_record,
)
from lightning.pytorch import Callback
from transformers import TrainerCallback

BATCH = 32
Run = dict[str, Any]


class Clock:
    """Time and work of one training loop; the device is waited for at both ends."""

    def __init__(self) -> None:
        self.seconds = self.since = 0.0
        self.sequences = self.tokens = 0

    def start(self) -> None:
        self.wait()
        self.since = time.perf_counter()

    def stop(self) -> None:
        self.wait()
        self.seconds += time.perf_counter() - self.since

    @staticmethod
    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


class LightningClock(Callback):
    """Drives a clock in Lightning, and counts what was really trained on."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.clock.start()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.clock.sequences += batch.size
        self.clock.tokens += batch.tokens

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


def timed(clock: Clock, train: Callable[[], Any], config: dict[str, Any]) -> Run:
    """Call `train`, and report rates over the loop."""
    gc.collect()
    clock.wait()
    since = time.perf_counter()
    train()
    clock.wait()
    return {
        "loop_seconds": clock.seconds,
        "call_seconds": time.perf_counter() - since,
        "sequences": clock.sequences,
        "tokens": clock.tokens,
        "samples_per_s": clock.sequences / clock.seconds,
        "tokens_per_s": clock.tokens / clock.seconds,
        "config": config,
    }


def train_ours(job: Job, folder: str, precision: str) -> Run:
    clock = Clock()
    trainer, module, data = build_ours(job, folder, precision, [LightningClock(clock)])
    config = describe_ours(module, data, precision)
    return timed(clock, lambda: trainer.fit(module, datamodule=data), config)


def train_trainer(job: Job, folder: str, **options: Any) -> Run:
    clock = Clock()
    rows = encode(job, job.read(job.train_file, job.rows))
    clock.sequences, clock.tokens = len(rows), sum(len(row["input_ids"]) for row in rows)
    trainer = build_trainer(job, rows, folder, [TransformersClock(clock)], **options)
    return timed(clock, trainer.train, describe_trainer(trainer))


def train_cross_encoder(job: Job, folder: str) -> Run:
    """sentence-transformers as its training overview shows it; it tokenises in the collator, so within the loop."""
    from datasets import Dataset
    from sentence_transformers.cross_encoder import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        losses,
    )
    from transformers import set_seed

    clock = Clock()
    table = job.read(job.train_file, job.rows)
    rows = encode(job, table)
    clock.sequences, clock.tokens = len(rows), sum(len(row["input_ids"]) for row in rows)
    first, second = zip(*table.texts, strict=True)
    labels = [float(row["labels"]) for row in rows]
    set_seed(job.seed)
    model = CrossEncoder(job.model, num_labels=1, max_length=job.max_length, device=job.device)
    arguments = CrossEncoderTrainingArguments(
        output_dir=folder,
        num_train_epochs=job.epochs,
        per_device_train_batch_size=job.batch,
        learning_rate=job.lr,
        seed=job.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=job.device == "cpu",
    )
    trainer = CrossEncoderTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"premise": first, "hypothesis": second, "label": labels}),
        loss=losses.BinaryCrossEntropyLoss(model),
        callbacks=[TransformersClock(clock)],
    )
    return timed(clock, trainer.train, {"max_length": model.max_length, "tokenises": "in the loop"})


OURS: dict[str, Callable[[Job, str], Run]] = {
    "lightning-bge bf16": partial(train_ours, precision="bf16-mixed"),
    "lightning-bge fp32": partial(train_ours, precision="32-true"),
}
TRAINER: dict[str, Callable[[Job, str], Run]] = {
    "Trainer": train_trainer,
    "Trainer bf16": partial(train_trainer, bf16=True),
}
TUNED: dict[str, Callable[[Job, str], Run]] = {
    f"Trainer bf16 grouped {size}x{BATCH // size}": partial(
        train_trainer,
        bf16=True,
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=size,
        gradient_accumulation_steps=BATCH // size,
    )
    for size in (4, 8, 16, 32)
}
CONTENDERS = {**OURS, **TRAINER, "CrossEncoderTrainer": train_cross_encoder, **TUNED}


def run_contender(name: str, job: Job, warmup_rows: int) -> Run:
    """One run, warm-up before it; what the libraries print goes to stderr."""
    train = CONTENDERS[name]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        if warmup_rows:
            train(replace(job, rows=warmup_rows), folder)
        return {**train(job, folder), "threads": torch.get_num_threads()}


def in_fresh_process(name: str, job: Job, warmup_rows: int) -> Run:
    """`run_contender` in a process of its own, so that no run finds what another one left behind."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run_contender, name, job, warmup_rows).result()


def measure(names: list[str], job: Job, rounds: int, warmup_rows: int) -> list[Run]:
    """All runs, in turns.

    Raises:
        RuntimeError: two contenders did not train on the same rows, tokens and threads.
    """
    runs: list[Run] = []
    for number in range(1, rounds + 1):
        for name in names:
            load = os.getloadavg()[0]
            run = {"contender": name, "round": number, "load": load, **in_fresh_process(name, job, warmup_rows)}
            runs.append(run)
            print(f"round {number}, {name}: {run['samples_per_s']:.1f} samples/s", flush=True)
            for same in ("sequences", "tokens", "threads"):
                if run[same] != runs[0][same]:
                    raise RuntimeError(f"{name} had {run[same]} {same}, {names[0]} {runs[0][same]}: not comparable")
    return runs


def summarize(runs: list[Run], names: list[str]) -> dict[str, Any]:
    """Medians of each contender, and ratios of samples/s between each of ours and each peer."""

    def values(name: str, field: str) -> list[float]:
        return [run[field] for run in runs if run["contender"] == name]

    fields = ("samples_per_s", "tokens_per_s", "loop_seconds", "call_seconds")
    medians = {name: {field: median(values(name, field)) for field in fields} for name in names}
    ratios = {}
    for ours in OURS:
        for peer in names:
            if peer in OURS:
                continue
            pairs = zip(values(ours, "samples_per_s"), values(peer, "samples_per_s"), strict=True)
            ratios[f"{ours} / {peer}"] = {
                "of_medians": medians[ours]["samples_per_s"] / medians[peer]["samples_per_s"],
                "by_round": [a / b for a, b in pairs],
                "of_median_calls": medians[peer]["call_seconds"] / medians[ours]["call_seconds"],
            }
    return {"medians": medians, "ratios": ratios}


def print_summary(summary: dict[str, Any]) -> None:
    print()
    rows = [(name, *values.values()) for name, values in summary["medians"].items()]
    print_table(("median of the rounds", "samples/s", "real tokens/s", "loop s", "call s"), rows)
    print()
    ratios = [
        (name, found["of_medians"], min(found["by_round"]), max(found["by_round"]), found["of_median_calls"])
        for name, found in summary["ratios"].items()
    ]
    print_table(("ratio of samples/s", "of medians", "lowest round", "highest round", "of whole calls"), ratios)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Training speed against transformers' Trainer, on RTE.")
    add_shared_arguments(parser, "docs/benchmarks/train_speed.json", lr=5e-5)
    parser.add_argument("--rows", type=int, default=640, help="pairs of the epoch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender (default: %(default)s)")
    parser.add_argument("--peers", choices=("trainer", "all"), default="trainer", help="all: sentence-transformers too")
    parser.add_argument("--warmup-steps", type=int, default=4, help="untimed steps before (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    given = parser.parse_args(args)
    check_shared_arguments(given)
    job = Job(
        model=given.model,
        train_file=str(Path(given.data, "rte", "train.tsv")),
        task="binary",
        text_columns=("sentence1", "sentence2"),
        label_column="label",
        labels=("not_entailment", "entailment"),
        device=given.device,
        rows=given.rows,
        lr=given.lr,
        seed=given.seed,
        batch=BATCH,
    )
    names = list(CONTENDERS) if given.peers == "all" else [*OURS, *TRAINER]
    runs = measure(names, job, given.rounds, given.warmup_steps * BATCH)
    summary = summarize(runs, names)
    print_summary(summary)
    configs = {run["contender"]: run.pop("config") for run in runs}
    shared = {name: value for name, value in asdict(job).items() if name not in ("model", "train_file")}
    record = {"data": "rte/train.tsv", "timed": "loop_seconds: one epoch, from its start to its end", "job": shared}
    write_record(given.out, "train_speed", given, {**record, "contenders": configs, **summary, "runs": runs})
    print(f"\n{given.out}")


if __name__ == "__main__":
    main()
