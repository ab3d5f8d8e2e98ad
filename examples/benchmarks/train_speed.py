"""Training speed: lightning-bge against its peers, one epoch over RTE, effective batch 32.

    pip install -r examples/benchmarks/requirements.txt
    python examples/benchmarks/train_speed.py --data FOLDER            # FOLDER/rte/train.tsv
    python examples/benchmarks/train_speed.py --data FOLDER --peers all

The contenders take turns (A B C A B C ...), each run in a fresh process: it loads weights, tokenizes, trains a few
steps on a copy to warm up, then trains one epoch from fresh weights. `loop_seconds`, from which all rates come, is
the time from the epoch's start to its end: fetching and padding batches, forward, backward, clipping, optimizer
step, with the device waited for at both ends. Loading and tokenizing lie outside, except for sentence-transformers
and FlagEmbedding, which tokenize during training. `call_seconds` is the whole call of `fit` or `train`. Number of
threads: OMP_NUM_THREADS, the same for all. Give the machine nothing else to do meanwhile.

Then the losses of `--loss-curve` steps are compared with those of a plain padded loop: see `loss_curve.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from common import (
    Job,
    add_shared_arguments,
    build_ours,
    check_shared_arguments,
    describe_ours,
    rte_job,
    write_record,
)
from loss_curve import compare_losses
from measures import (
    DEFINITIONS,
    Clock,
    LightningClock,
    Run,
    fresh,
    matmul_peak,
    medians_of,
    model_flops,
    model_shape,
    peak_memory_mib,
    ratio_of,
    timed,
    values_of,
)
from note import table, write_note
from peers import BATCH, CROSS_ENCODER, SIZES, TEXTBOOK, TRAINER, run_flagembedding, train_tuned

FLAG = "FlagEmbedding"
BEST = "best tuned Trainer"


def train_ours(job: Job, folder: str, precision: str) -> Run:
    clock = Clock()
    trainer, module, data = build_ours(job, folder, precision, [LightningClock(clock)])
    config = describe_ours(module, data, precision)
    dtype = "bf16" if precision == "bf16-mixed" else "fp32"
    return timed(clock, lambda: trainer.fit(module, datamodule=data), config, dtype)


OURS: dict[str, Callable[[Job, str], Run]] = {
    "lightning-bge bf16": partial(train_ours, precision="bf16-mixed"),
    "lightning-bge fp32": partial(train_ours, precision="32-true"),
}
TUNED: dict[str, Callable[[Job, str], Run]] = {
    f"Trainer bf16 grouped {size}x{BATCH // size}": partial(train_tuned, size=size) for size in SIZES
}
CONTENDERS = {**OURS, **TRAINER, **CROSS_ENCODER, **TEXTBOOK, **TUNED}


def run_contender(name: str, job: Job, warmup_rows: int) -> Run:
    """One run, warm-up before it; what the libraries print goes to stderr."""
    train = CONTENDERS[name]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        if warmup_rows:
            train(replace(job, rows=warmup_rows), folder)
        run = train(job, folder)
    return {**run, "threads": torch.get_num_threads(), "peak_memory_mib": peak_memory_mib()}


def one_run(name: str, job: Job, warmup_rows: int, flagembedding: str | None = None) -> Run:
    """`run_contender` in a process of its own."""
    if name == FLAG:
        assert flagembedding is not None
        return run_flagembedding(job, warmup_rows, flagembedding)
    return fresh(run_contender, name, job, warmup_rows)


def measure(
    names: list[str], job: Job, rounds: int, warmup_rows: int, flagembedding: str | None = None
) -> tuple[list[Run], list[dict[str, float]]]:
    """All runs, in turns, and the machine's peak (FLOP/s) at the start of each round.

    Raises:
        RuntimeError: two contenders did not train on the same rows, tokens and threads.
    """
    runs: list[Run] = []
    peaks: list[dict[str, float]] = []
    shape = model_shape(job.model)
    for number in range(1, rounds + 1):
        peaks.append(fresh(matmul_peak, job.device))
        print(f"round {number}: " + ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in peaks[-1].items()), flush=True)
        for name in names:
            load = os.getloadavg()[0]
            found = one_run(name, job, warmup_rows, flagembedding)
            flops = model_flops(shape, found["tokens"], found["length_squares"]) / found["loop_seconds"]
            used = {"flops_per_s": flops, "utilisation": flops / peaks[-1][found["dtype"]]}
            runs.append({"contender": name, "round": number, "load": load, **found, **used})
            print(f"round {number}, {name}: {found['samples_per_s']:.1f} samples/s", flush=True)
            check_same(runs)
    return runs, peaks


def check_same(runs: list[Run]) -> None:
    """Refuse a run whose work was another than the first one's."""
    first, last = runs[0], runs[-1]
    for same in ("sequences", "tokens", "threads"):
        if last[same] != first[same]:
            raise RuntimeError(
                f"{last['contender']} had {last[same]} {same}, {first['contender']} {first[same]}: not comparable"
            )


FIELDS = (
    "samples_per_s",
    "tokens_per_s",
    "utilisation",
    "flops_per_s",
    "peak_memory_mib",
    "loop_seconds",
    "call_seconds",
)


def summarize(runs: list[Run], names: list[str]) -> dict[str, Any]:
    """Medians of each contender, and ratios of samples/s between each of ours and each peer."""

    def ratio(ours: str, peer: str) -> dict[str, Any]:
        rates = (values_of(runs, name, "samples_per_s") for name in (ours, peer))
        calls = medians[peer]["call_seconds"] / medians[ours]["call_seconds"]
        return {**ratio_of(*rates), "of_median_calls": calls}

    medians = medians_of(runs, names, FIELDS)
    tuned = [name for name in names if name in TUNED]
    best = max(tuned, key=lambda name: medians[name]["samples_per_s"], default=None)
    ours = [name for name in names if name in OURS]
    ratios = {f"{name} / {peer}": ratio(name, peer) for name in ours for peer in names if peer not in OURS}
    if best is not None:
        ratios |= {f"{name} / {BEST}": ratio(name, best) for name in ours}
    return {"medians": medians, "best_tuned": best, "ratios": ratios}


def tables(summary: dict[str, Any]) -> list[str]:
    """The two tables of the summary: medians and ratios."""
    header = ("median of the rounds", "samples/s", "real tokens/s", "utilization", "peak memory, MiB", "loop s")
    names = ("samples_per_s", "tokens_per_s", "utilisation", "peak_memory_mib", "loop_seconds")
    rows = [(name, *(values[field] for field in names)) for name, values in summary["medians"].items()]
    ratios = [
        (name, found["of_medians"], min(found["by_round"]), max(found["by_round"]), found["of_median_calls"])
        for name, found in summary["ratios"].items()
    ]
    columns = ("ratio of samples/s", "of medians", "lowest round", "highest round", "of whole calls")
    return [table(header, rows), table(columns, ratios)]


def describe_losses(found: dict[str, Any]) -> str:
    return (
        f"Losses of {found['steps']} steps ({found['epochs']} epochs), fp32, no dropout, lightning-bge packed against "
        f"a plain padded loop over transformers' model with the same batches and initial weights: they differ by "
        f"{found['largest_difference']:.2g} at most; the limit is {found['limit']:g}."
    )


def note_sections(record: dict[str, Any], job: Job, rounds: int) -> list[str]:
    """What the note says besides machine and command."""
    sections = [
        f"{job.rows} pairs of RTE, one epoch, effective batch {job.batch}, learning rate {job.lr:g}, linear schedule "
        "without warm-up, AdamW without weight decay, clipping at 1, the dropout of the checkpoint, fp32 weights "
        f"everywhere. {rounds} rounds in turns, each run in a fresh process after a warm-up; loading and tokenizing "
        "are not timed, except for sentence-transformers and FlagEmbedding, which tokenize in the loop."
    ]
    if record["runs"]:
        sections += tables(record)
        peaks = "; ".join(", ".join(f"{k} {v / 1e9:.0f}" for k, v in peak.items()) for peak in record["peaks"])
        sections.append(f"The machine's peak by round, GFLOP/s: {peaks}. Best tuned Trainer: {record['best_tuned']}.")
    if record["loss_curve"] is not None:
        sections.append(describe_losses(record["loss_curve"]))
    return [*sections, DEFINITIONS, *(REMARKS[name] for name in record["contenders"] if name in REMARKS)]


REMARKS = {
    "textbook Lightning": "The textbook module calls `.train()` on the encoder, which Lightning does not: without it "
    "dropout would be off, as `from_pretrained` returns eval mode.",
    FLAG: "FlagEmbedding trains groups of passages; here each pair is a group of its own, whose loss is 0: the work is "
    "the same, and nothing is learned.",
}


def parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training speed against the peers, on RTE.")
    add_shared_arguments(parser, "docs/benchmarks/train_speed.json", lr=5e-5)
    parser.add_argument("--rows", type=int, default=640, help="pairs of the epoch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; 0: losses only (default: %(default)s)")
    parser.add_argument("--peers", choices=("trainer", "all"), default="trainer", help="all: whatever is installed")
    parser.add_argument("--contenders", nargs="+", choices=(*CONTENDERS, FLAG), help="these alone, whatever --peers")
    parser.add_argument("--flagembedding", metavar="PYTHON", help="one that has FlagEmbedding: a peer more")
    parser.add_argument("--warmup-steps", type=int, default=4, help="untimed steps before (default: %(default)s)")
    parser.add_argument("--loss-curve", type=int, default=60, help="steps compared; 0: none (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    given = parser.parse_args(args)
    check_shared_arguments(given)
    given.contenders = choose(given)
    return given


def choose(given: argparse.Namespace) -> list[str]:
    """The contenders' names; says which of all are left out, and why."""
    names = given.contenders
    if names is None:
        names = [*OURS, *TRAINER] if given.peers == "trainer" else list(CONTENDERS)
        if given.flagembedding:
            names.append(FLAG)
    if FLAG in names and not given.flagembedding:
        raise SystemExit(f"{FLAG} needs --flagembedding PYTHON, an interpreter that has it installed")
    missing = [package for package in ("sentence_transformers", "datasets") if find_spec(package) is None]
    absent = [name for name in names if name in CROSS_ENCODER] if missing else []
    if absent and given.contenders:
        raise SystemExit(f"{', '.join(absent)}: needs {', '.join(missing)}")
    if absent:
        print(f"left out, as {', '.join(missing)} is not installed: {', '.join(absent)}")
    return [name for name in names if name not in absent]


def make_job(given: argparse.Namespace) -> Job:
    return rte_job(given, rows=given.rows, batch=BATCH, lr=given.lr)


def main(args: list[str] | None = None) -> None:
    given = parse(args)
    job = make_job(given)
    names = given.contenders
    runs, peaks = measure(names, job, given.rounds, given.warmup_steps * BATCH, given.flagembedding)
    summary = summarize(runs, names) if runs else {"medians": {}, "best_tuned": None, "ratios": {}}
    if runs:
        print("", *tables(summary), sep="\n\n")
    losses = fresh(compare_losses, job, given.loss_curve) if given.loss_curve else None
    if losses is not None:
        print(f"\n{describe_losses(losses)}")
    record: dict[str, Any] = {
        "data": "rte/train.tsv",
        "timed": "loop_seconds: one epoch, from its start to its end",
        "job": {name: value for name, value in asdict(job).items() if name not in ("model", "train_file")},
        "shape": model_shape(job.model),
        "peaks": peaks,
        "contenders": {run["contender"]: run.pop("config") for run in runs},
        **summary,
        "loss_curve": losses,
        "runs": runs,
    }
    write_record(given.out, "train_speed", given, record)
    note = write_note(given.out, "Training speed", note_sections(record, job, given.rounds))
    print(f"\n{given.out}\n{note}")


if __name__ == "__main__":
    main()
