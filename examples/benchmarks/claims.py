"""The gains that are claimed for each optimisation, beside what they are here: without and with it, in turns.

    python examples/benchmarks/claims.py --data FOLDER                    # FOLDER/rte/train.tsv; a quarter of an hour
    python examples/benchmarks/claims.py --data FOLDER --only bf16,fused --out some.json --page some.md

Each claim is a short training of MiniLM-L6 on the first pairs of RTE, alike but for one switch: an untimed step to warm
up, then the timed ones. The two sides take turns, the first one changing from round to round, all in this process. The
claims about searches are replayed from the recorded ones of docs/benchmarks/curves. What does not apply to this machine
says why. Number of threads: OMP_NUM_THREADS. Give the machine nothing else to do meanwhile.

A machine with CUDA fills the GPU's columns. `docs/claims.md` gets its table anew from both records.
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

from claims_hpo import replay
from claims_page import tables, write_page
from claims_sides import (
    FOREACH,
    LOOP,
    Bench,
    compiled_step,
    plain_step,
    slow_step,
    step,
    try_compiling,
    worker_epoch,
)
from common import add_shared_arguments, check_shared_arguments, rte_job, write_record
from measures import ratio_of

DOCS = Path(__file__).parents[2] / "docs"
RECORDS = {"CPU": DOCS / "benchmarks" / "claims.json", "GPU": DOCS / "benchmarks" / "claims_gpu.json"}
SEARCHES = "searches"
ROWS = 256  # pairs of RTE to draw from, or as many as the steps need
Side = Callable[[Bench], float]


@dataclass(frozen=True)
class Claim:
    """One row.

    Attributes:
        name: of the optimisation.
        claimed: its gain, as it is said to be.
        sides: without it and with it, in words.
        without: seconds without it.
        with_it: seconds with it.
        on_cpu: why it does not apply there; None: it does.
        prepare: what has to be done once, and why it failed.
    """

    name: str
    claimed: str
    sides: tuple[str, str]
    without: Side
    with_it: Side
    on_cpu: str | None = None
    prepare: Callable[[Bench], str | None] = lambda bench: None


def try_both(bench: Bench) -> str | None:
    return try_compiling(bench) or try_compiling(bench, "max-autotune")


CLAIMS = {
    "bf16": Claim(
        "bf16 mixed precision",
        "2x",
        ("32-true", "bf16-mixed"),
        partial(slow_step, precision="32-true"),
        partial(slow_step, precision="bf16-mixed"),
    ),
    "tf32": Claim(
        "TF32",
        "2-3x",
        ("fp32", "TF32"),
        partial(step, precision="32-true", tf32=False),
        partial(step, precision="32-true", tf32=True),
        "TF32 is for CUDA",
    ),
    "fused": Claim("fused AdamW", "5-10 %", ("a parameter at a time", "fused"), partial(step, adamw=LOOP), step),
    "fused_foreach": Claim("fused AdamW", "5-10 %", ("foreach", "fused"), partial(step, adamw=FOREACH), step),
    "set_to_none": Claim(
        "zero_grad(set_to_none=True)", "2-5 %", ("filled with zeros", "None"), partial(step, fill_zeros=True), step
    ),
    "sdpa": Claim(
        "SDPA attention, padded",
        "0-5 %",
        ("eager", "sdpa"),
        partial(plain_step, attention="eager"),
        partial(plain_step, attention="sdpa"),
    ),
    "packed": Claim("no padding", "not claimed", ("padded", "packed"), partial(step, attention="padded"), step),
    "batch": Claim(
        "largest micro-batch that fits",
        "20-50 %",
        ("micro-batches of 256 tokens", "of up to 8,192"),
        partial(step, batching={"max_tokens": 256}),
        step,
    ),
    "persistent": Claim(
        "persistent workers",
        "5-10 %",
        ("started each epoch", "kept"),
        partial(worker_epoch, persistent=False),
        partial(worker_epoch, persistent=True),
    ),
    "pin": Claim(
        "pin_memory",
        "10-20 %",
        ("pageable", "pinned"),
        partial(step, batching={"pin_memory": False}),
        partial(step, batching={"pin_memory": True}),
        "nothing is copied to a device",
    ),
    "cudnn": Claim(
        "cuDNN benchmark",
        "5-15 %",
        ("off", "on"),
        partial(step, cudnn_benchmark=False),
        partial(step, cudnn_benchmark=True),
        "cuDNN is for CUDA, and the model has no convolution",
    ),
    "compile": Claim(
        "torch.compile",
        "10-20 %",
        ("eager", "compiled"),
        partial(compiled_step, policy="never"),
        partial(compiled_step, policy="always"),
        prepare=try_compiling,
    ),
    "max_autotune": Claim(
        "max-autotune",
        "5-10 %",
        ("mode default", "mode max-autotune"),
        partial(compiled_step, policy="always"),
        partial(compiled_step, policy="always", mode="max-autotune"),
        prepare=try_both,
    ),
}


def obstacles(names: list[str], bench: Bench) -> dict[str, str]:
    """The claims that can't be measured here, and why; compiling is tried for that, and its graphs stay."""
    found = {}
    for name in names:
        claim = CLAIMS[name]
        reason = (claim.on_cpu if bench.job.device == "cpu" else None) or claim.prepare(bench)
        if reason is not None:
            found[name] = reason
            print(f"{name}: not measured: {reason}", flush=True)
    return found


def measure(names: list[str], bench: Bench, rounds: int) -> list[dict[str, Any]]:
    """Seconds of both sides of each claim, round by round."""
    runs = []
    for number in range(1, rounds + 1):
        for name in names:
            claim = CLAIMS[name]
            sides: list[tuple[str, Side]] = [("without", claim.without), ("with", claim.with_it)]
            load = os.getloadavg()[0]
            found = {side: seconds(bench) for side, seconds in (sides if number % 2 else sides[::-1])}
            runs.append({"claim": name, "round": number, "load": load, **found})
            print(f"round {number}, {name}: {found['without']:.3f} s without, {found['with']:.3f} s with", flush=True)
    return runs


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each claim the medians of both sides, and how many times as fast it is: of the medians, and by round."""
    found = {}
    for name in dict.fromkeys(run["claim"] for run in runs):
        mine = [run for run in runs if run["claim"] == name]
        seconds = {side: [run[side] for run in mine] for side in ("without", "with")}
        medians = {side: median(values) for side, values in seconds.items()}
        found[name] = {**medians, "times_as_fast": ratio_of(seconds["without"], seconds["with"])}
    return found


# ---------------------------------------------------------------------- the program


def parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_arguments(parser, "docs/benchmarks/claims.json", lr=None)
    parser.set_defaults(out=None)
    parser.add_argument("--rounds", type=int, default=5, help="of all claims (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=16, help="of an optimizer step (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="timed ones (default: 3 on a CPU, 60 on a GPU)")
    parser.add_argument("--compile-limit", type=float, default=120.0, help="s to compile a layer; default 120")
    parser.add_argument("--orders", type=int, default=100, help="of a replayed search (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    known = ", ".join([*CLAIMS, SEARCHES])
    parser.add_argument("--only", help=f"these alone, with commas between: {known}. Needs an --out of its own")
    parser.add_argument("--page", help="whose tables are written anew (default: docs/claims.md; with --only: none)")
    given = parser.parse_args(args)
    check_shared_arguments(given)
    unknown = sorted({*(given.only or SEARCHES).split(",")} - {*CLAIMS, SEARCHES})
    if unknown:
        raise SystemExit(f"--only: there is no claim {', '.join(unknown)}; known: {known}")
    if given.only and not given.out:
        raise SystemExit("--only measures a part: name another --out, so that the record of all claims stays")
    given.steps = given.steps or (3 if given.device == "cpu" else 60)
    return given


def main(args: list[str] | None = None) -> None:
    given = parse(args)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it says on each fit which hardware it found
    machine = "CPU" if given.device == "cpu" else "GPU"
    asked = given.only.split(",") if given.only else [*CLAIMS, SEARCHES]
    names = [name for name in CLAIMS if name in asked]
    job = rte_job(given, rows=max(ROWS, (1 + given.steps) * given.pairs), batch=given.pairs)
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(sys.stderr):
        bench = Bench(job, cache, given.steps, compile_limit=given.compile_limit)
        hindered = obstacles(names, bench)
        runs = measure([name for name in names if name not in hindered], bench, given.rounds)
    record = {
        "data": "rte/train.tsv",
        "timed": "seconds of an optimizer step; persistent: of an epoch, its workers' start in it",
        "precision": bench.precision,
        "rounds": given.rounds,
        "obstacles": hindered,
        "summary": summarize(runs),
        "searches": replay(given.orders, given.seed) if SEARCHES in asked else None,
        "runs": runs,
    }
    save(given, machine, record)


def save(given: argparse.Namespace, machine: str, record: dict[str, Any]) -> None:
    """Write the record and the page, and print the tables."""
    out = Path(given.out) if given.out else RECORDS[machine]
    page = given.page or (None if given.only else DOCS / "claims.md")
    del given.page
    write_record(str(out), "claims", given, record)
    rows = {name: (claim.name, " / ".join(claim.sides), claim.claimed) for name, claim in CLAIMS.items()}
    print(tables(rows, {machine: json.loads(out.read_text(encoding="utf-8"))}))
    if page is not None:
        write_page(Path(page), rows, {**RECORDS, machine: out})


if __name__ == "__main__":
    main()
