"""The gain that is expected of each optimization, beside the gain measured here: without and with it, in turns.

    python examples/benchmarks/optimizations.py --data FOLDER      # FOLDER/rte/train.tsv; a quarter of an hour
    python examples/benchmarks/optimizations.py --data FOLDER --only bf16,fused --out some.json --page some.md

Each optimization is a short training of MiniLM-L6 on the first pairs of RTE, once without it and once with it: a
warm-up step, then the timed steps. The two sides take turns in one process, in the opposite order in every second
round. Pruning is replayed from the studies recorded in docs/benchmarks/curves. Optimizations that this machine does
not support are listed with the reason. Number of threads: OMP_NUM_THREADS. Run nothing else.

A machine with CUDA fills the GPU columns. The tables of `docs/optimizations.md` are written from both records.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from common import add_shared_arguments, check_shared_arguments, rte_job, write_record
from measures import ratio_of
from optimizations_page import tables, write_page
from optimizations_pruning import replay
from optimizations_training import (
    FOREACH,
    LOOP,
    ShortTraining,
    compiled_step,
    plain_step,
    slow_step,
    step,
    try_compiling,
    worker_epoch,
)

DOCS = Path(__file__).parents[2] / "docs"
RECORDS = {"CPU": DOCS / "benchmarks" / "optimizations.json", "GPU": DOCS / "benchmarks" / "optimizations_gpu.json"}
PRUNING = "pruning"
ROWS = 256  # pairs of RTE to draw from, or as many as the steps need
Side = Callable[[ShortTraining], float]


@dataclass(frozen=True)
class Optimization:
    """One optimization and its two sides.

    Attributes:
        name: as it is shown in the table.
        expected: the gain that guides to fast training state for it.
        sides: labels of the side without it and of the side with it.
        without: measures seconds without it.
        with_it: measures seconds with it.
        on_cpu: why it has no effect on a CPU; None: it has one.
        prepare: runs once before the rounds; returns why the optimization is not available, or None.
    """

    name: str
    expected: str
    sides: tuple[str, str]
    without: Side
    with_it: Side
    on_cpu: str | None = None
    prepare: Callable[[ShortTraining], str | None] = lambda training: None


def try_both(training: ShortTraining) -> str | None:
    return try_compiling(training) or try_compiling(training, "max-autotune")


OPTIMIZATIONS = {
    "bf16": Optimization(
        "bf16 mixed precision",
        "2x",
        ("32-true", "bf16-mixed"),
        partial(slow_step, precision="32-true"),
        partial(slow_step, precision="bf16-mixed"),
    ),
    "tf32": Optimization(
        "TF32",
        "2-3x",
        ("fp32", "TF32"),
        partial(step, precision="32-true", tf32=False),
        partial(step, precision="32-true", tf32=True),
        "TF32 needs a CUDA device",
    ),
    "fused": Optimization("fused AdamW", "5-10 %", ("loop over parameters", "fused"), partial(step, adamw=LOOP), step),
    "fused_foreach": Optimization("fused AdamW", "5-10 %", ("foreach", "fused"), partial(step, adamw=FOREACH), step),
    "set_to_none": Optimization(
        "zero_grad(set_to_none=True)", "2-5 %", ("filled with zeros", "None"), partial(step, fill_zeros=True), step
    ),
    "sdpa": Optimization(
        "SDPA attention, padded",
        "0-5 %",
        ("eager", "sdpa"),
        partial(plain_step, attention="eager"),
        partial(plain_step, attention="sdpa"),
    ),
    "packed": Optimization("no padding", "no figure", ("padded", "packed"), partial(step, attention="padded"), step),
    "batch": Optimization(
        "largest micro-batch that fits",
        "20-50 %",
        ("micro-batches of 256 tokens", "of up to 8,192"),
        partial(step, batching={"max_tokens": 256}),
        step,
    ),
    "persistent": Optimization(
        "persistent workers",
        "5-10 %",
        ("started each epoch", "kept"),
        partial(worker_epoch, persistent=False),
        partial(worker_epoch, persistent=True),
    ),
    "pin": Optimization(
        "pin_memory",
        "10-20 %",
        ("pageable", "pinned"),
        partial(step, batching={"pin_memory": False}),
        partial(step, batching={"pin_memory": True}),
        "no batch is copied to a device",
    ),
    "cudnn": Optimization(
        "cuDNN benchmark",
        "5-15 %",
        ("off", "on"),
        partial(step, cudnn_benchmark=False),
        partial(step, cudnn_benchmark=True),
        "cuDNN needs a CUDA device, and the model has no convolution",
    ),
    "compile": Optimization(
        "torch.compile",
        "10-20 %",
        ("eager", "compiled"),
        partial(compiled_step, policy="never"),
        partial(compiled_step, policy="always"),
        prepare=try_compiling,
    ),
    "max_autotune": Optimization(
        "max-autotune",
        "5-10 %",
        ("mode default", "mode max-autotune"),
        partial(compiled_step, policy="always"),
        partial(compiled_step, policy="always", mode="max-autotune"),
        prepare=try_both,
    ),
}


def find_unavailable(names: list[str], training: ShortTraining) -> dict[str, str]:
    """Optimizations that can't be measured on this machine, with the reason."""
    found = {}
    for name in names:
        row = OPTIMIZATIONS[name]
        reason = (row.on_cpu if training.job.device == "cpu" else None) or row.prepare(training)
        if reason is not None:
            found[name] = reason
            print(f"{name}: not measured: {reason}", flush=True)
    return found


def measure(names: list[str], training: ShortTraining, rounds: int) -> list[dict[str, Any]]:
    """Seconds of both sides of each optimization, for each round."""
    runs = []
    for number in range(1, rounds + 1):
        for name in names:
            row = OPTIMIZATIONS[name]
            sides: list[tuple[str, Side]] = [("without", row.without), ("with", row.with_it)]
            load = os.getloadavg()[0]
            found = {side: seconds(training) for side, seconds in (sides if number % 2 else sides[::-1])}
            runs.append({"optimization": name, "round": number, "load": load, **found})
            print(f"round {number}, {name}: {found['without']:.3f} s without, {found['with']:.3f} s with", flush=True)
    return runs


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """For each optimization the medians of both sides, and the speed-up: of the medians and of each round."""
    found = {}
    for name in dict.fromkeys(run["optimization"] for run in runs):
        mine = [run for run in runs if run["optimization"] == name]
        seconds = {side: [run[side] for run in mine] for side in ("without", "with")}
        medians = {side: median(values) for side, values in seconds.items()}
        found[name] = {**medians, "times_as_fast": ratio_of(seconds["without"], seconds["with"])}
    return found


# ---------------------------------------------------------------------- the program


def parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_arguments(parser, "docs/benchmarks/optimizations.json", lr=None)
    parser.set_defaults(out=None)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=16, help="per optimizer step (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="timed optimizer steps (default: 3 on a CPU, 60 on a GPU)")
    parser.add_argument("--compile-limit", type=float, default=120.0, help="seconds a layer (default: 120)")
    parser.add_argument("--orders", type=int, default=100, help="of a replayed study (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    known = ", ".join([*OPTIMIZATIONS, PRUNING])
    parser.add_argument("--only", help=f"measure only these, separated by commas: {known}. Needs its own --out")
    parser.add_argument("--page", help="whose tables are replaced (default: docs/optimizations.md; with --only: none)")
    given = parser.parse_args(args)
    check_shared_arguments(given)
    unknown = sorted({*(given.only or PRUNING).split(",")} - {*OPTIMIZATIONS, PRUNING})
    if unknown:
        raise SystemExit(f"--only: unknown optimization {', '.join(unknown)}; known: {known}")
    if given.only and not given.out:
        raise SystemExit("--only: name another --out, so that the record of all optimizations is kept")
    given.steps = given.steps or (3 if given.device == "cpu" else 60)
    return given


def main(args: list[str] | None = None) -> None:
    given = parse(args)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it logs the hardware on each fit
    machine = "CPU" if given.device == "cpu" else "GPU"
    asked = given.only.split(",") if given.only else [*OPTIMIZATIONS, PRUNING]
    names = [name for name in OPTIMIZATIONS if name in asked]
    job = rte_job(given, rows=max(ROWS, (1 + given.steps) * given.pairs), batch=given.pairs)
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(sys.stderr):
        training = ShortTraining(job, cache, given.steps, compile_limit=given.compile_limit)
        unavailable = find_unavailable(names, training)
        runs = measure([name for name in names if name not in unavailable], training, given.rounds)
    record = {
        "data": "rte/train.tsv",
        "timed": "seconds of an optimizer step; persistent: of an epoch, its workers' start in it",
        "precision": training.precision,
        "rounds": given.rounds,
        "not_measured": unavailable,
        "summary": summarize(runs),
        "pruning": replay(given.orders, given.seed) if PRUNING in asked else None,
        "runs": runs,
    }
    save(given, machine, record)


def save(given: argparse.Namespace, machine: str, record: dict[str, Any]) -> None:
    """Write the record and the page, and print the tables."""
    out = Path(given.out) if given.out else RECORDS[machine]
    page = given.page or (None if given.only else DOCS / "optimizations.md")
    del given.page
    write_record(str(out), "optimizations", given, record)
    rows = {name: (row.name, " / ".join(row.sides), row.expected) for name, row in OPTIMIZATIONS.items()}
    print(tables(rows, {machine: json.loads(out.read_text(encoding="utf-8"))}))
    if page is not None:
        write_page(Path(page), rows, {**RECORDS, machine: out})


if __name__ == "__main__":
    main()
