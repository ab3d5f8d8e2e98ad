"""Training speed on one GPU: ours, the floor under it, the peers, our switches one at a time, and the host's share.

    pip install -r examples/benchmarks/requirements.txt
    python examples/benchmarks/gpu_suite.py                          # 8 minutes on one big GPU
    python examples/benchmarks/gpu_suite.py --parts compile          # all parts with this in their name
    python examples/benchmarks/gpu_suite.py --tiny --device cpu      # seconds; shows that everything runs

No checkpoint and no data set is read: weights are random in the shapes of real models, rows are random token ids in
RTE's lengths or in a long tail up to 512 tokens. Parts run in order of importance: the first ones that `--minutes`
suffice for by their own estimates; what was left out is listed. The record is written anew after each part, so that a
run that is cut off leaves what it had. What is measured, and how: docs/benchmarks/gpu.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import REPOSITORY, write_record
from gpu_contenders import Ours, Train, missing_for_cross_encoder, peers, run_once, train_cross_encoder, train_ours
from gpu_contenders import train_tuned as train_tuned_trainer
from gpu_floor import BACK_ENDS, measure_back_end, measure_floor, measure_overhead
from gpu_memory import FRACTIONS, measure_memory
from gpu_note import FIGURES, note_of
from gpu_parts import Bench, Case, Limit
from measures import Run, matmul_peak, ratio_of

from lightning_bge.models.encoder import quiet_transformers

MAIN = "bge-base-en-v1.5"
BATCHES = (32, 256)
MICRO_BATCH_TOKENS = (4096, 8192, 16384, 65536)
PEAK_SECONDS = 10  # estimate: imports are before the clock starts, the measured peak after it
COMPILE_WARMUP = 15  # steps, in which every shape that needs a graph of its own should come
OURS = "lightning-bge"


@dataclass
class Suite:
    """One run of the suite: its clock, its findings, what it left out and what went wrong."""

    bench: Bench
    rounds: int
    minutes: float
    peak: float = 0.0
    now: Callable[[], float] = time.monotonic
    parts: dict[str, Any] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began = self.now()

    def left(self) -> float:
        """Seconds until the time is spent."""
        return self.minutes * 60 - (self.now() - self.began)

    def skip(self, what: str, reason: str) -> None:
        """Leave something out, and say so."""
        self.skipped.append({"what": what, "reason": reason})
        print(f"skipped: {what}: {reason}", flush=True)

    def fail(self, what: str, error: Exception) -> None:
        """Keep an error's message, print where it came from, and go on."""
        message = str(error).strip().split("\n")[0][:300]
        self.failed.append({"what": what, "error": f"{type(error).__name__}: {message}"})
        print(f"FAILED: {what}: {type(error).__name__}: {message}", flush=True)
        traceback.print_exc(limit=-8)

    def turns(
        self, case: Case, contenders: Mapping[str, Train], rounds: int | None = None, warmup: int | None = None
    ) -> dict[str, Any]:
        """Let contenders train in turns; one that fails is out, and so is every one when the time is over."""
        bench = replace(self.bench, limit=replace(self.bench.limit, warmup=warmup or self.bench.limit.warmup))
        runs: dict[str, list[Run]] = {name: [] for name in contenders}
        out: set[str] = set()
        for number in range(1, (rounds or self.rounds) + 1):
            for name, train in contenders.items():
                what = f"{case}: {name}"
                if name in out:
                    continue
                if self.left() <= 0:
                    self.skip(f"{what}, round {number}", "the time was over")
                    continue
                try:
                    run = run_once(bench, case, train, self.peak)
                except Exception as error:
                    self.fail(what, error)
                    out.add(name)
                    continue
                runs[name].append(run)
                print(f"{what}, round {number}: {run['step_ms']:.2f} ms a step", flush=True)
        return summarize(runs)


def summarize(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Medians of each contender over its rounds, and the first contender's samples/s over every other one's."""
    found: dict[str, Any] = {}
    for name, listed in runs.items():
        if listed:
            medians = {figure: median_of([run[figure] for run in listed]) for figure in FIGURES}
            plain = [{key: value for key, value in run.items() if key != "config"} for run in listed]
            found[name] = {"median": medians, "runs": plain, "config": listed[0]["config"]}
    first = next(iter(runs))
    ratios = {}
    for name in found:
        if name != first and first in found:
            rates = [[run["samples_per_s"] for run in found[side]["runs"]] for side in (first, name)]
            ratios[f"{first} / {name}"] = ratio_of(*rates, strict=False)
    return {"contenders": found, "ratios": ratios}


def median_of(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


# The parts


def compare(suite: Suite, case: Case, tuned: tuple[int, ...], cross_encoder: bool = False) -> dict[str, Any]:
    """Ours, the floor under it, and the peers."""
    contenders: dict[str, Train] = {OURS: partial(train_ours, options=Ours()), **peers(tuned)}
    if cross_encoder:
        missing = missing_for_cross_encoder()
        if missing:
            suite.skip(f"{case}: CrossEncoderTrainer", f"not installed: {', '.join(missing)}")
        else:
            contenders["CrossEncoderTrainer"] = train_cross_encoder
    floor = measure_floor(suite.bench, case)
    found = {"case": vars(case), "floor": floor, **suite.turns(case, contenders)}
    if OURS in found["contenders"]:
        step = found["contenders"][OURS]["median"]["step_ms"]
        found["step_over_floor"] = step / floor["total_ms"]
        found["above_floor_ms"] = step - floor["total_ms"]
    return found


def switches(suite: Suite, case: Case) -> dict[str, Any]:
    """Each switch away from its default, the others left alone."""
    variants = {
        OURS: Ours(),
        "fp32 with TF32": Ours(precision="32-true"),
        "fp32": Ours(precision="32-true", tf32=False),
        "padded attention": Ours(attention="padded"),
        "foreach AdamW": Ours(fused=False),
        "dropout 0": Ours(dropout=0.0),
    }
    return suite.turns(case, {name: partial(train_ours, options=options) for name, options in variants.items()})


def micro_batch_sizes(suite: Suite, case: Case) -> dict[str, Any]:
    """How large a micro-batch should be."""
    default = Ours().tokens
    sizes = [default, *(tokens for tokens in MICRO_BATCH_TOKENS if tokens != default)]
    if suite.bench.tiny:
        sizes = [tokens // 64 for tokens in sizes]
    return suite.turns(case, {f"{tokens} tokens": partial(train_ours, options=Ours(tokens=tokens)) for tokens in sizes})


def back_ends(suite: Suite, case: Case) -> dict[str, Any]:
    """Ways to compute packed attention, each alone."""
    found = {}
    for name, attend, drops, on_cpu in BACK_ENDS:
        if suite.bench.device == "cpu" and not on_cpu:
            suite.skip(f"attention: {name}", "needs CUDA")
            continue
        try:
            found[name] = measure_back_end(suite.bench, case, attend, drops)
        except Exception as error:
            suite.fail(f"attention: {name}", error)
    return found


def compiled(suite: Suite, case: Case) -> dict[str, Any]:
    """Ours with compiled layers; one round, as each would compile anew."""
    variants = {
        OURS: Ours(),
        "compile default": Ours(compile="default"),
        "one shape": Ours(one_shape=True),
        "one shape, compile reduce-overhead": Ours(one_shape=True, compile="reduce-overhead"),
    }
    contenders = {name: partial(train_ours, options=options) for name, options in variants.items()}
    return suite.turns(case, contenders, rounds=1, warmup=COMPILE_WARMUP)


def compiled_peer(suite: Suite, case: Case) -> dict[str, Any]:
    """transformers' Trainer, tuned, with torch_compile; one round."""
    contenders: dict[str, Train] = {
        OURS: partial(train_ours, options=Ours()),
        "Trainer tuned, compiled": partial(train_tuned_trainer, accumulate=1, torch_compile=True),
    }
    return suite.turns(case, contenders, rounds=1, warmup=COMPILE_WARMUP)


@dataclass(frozen=True)
class Part:
    """A piece of the suite; `needs` is a rough guess at its seconds on a big GPU, and it begins only with that left."""

    name: str
    needs: float
    run: Callable[[Suite], dict[str, Any]]
    cuda: bool = False


def all_parts(bench: Bench) -> list[Part]:
    """Every part, the most important first."""
    small, large = (bench.case(MAIN, "rte", batch) for batch in BATCHES)
    found = [
        Part(f"compare {small}", 90, partial(compare, case=small, tuned=(1, 4), cross_encoder=True)),
        Part(f"compare {large}", 110, partial(compare, case=large, tuned=(1, 4), cross_encoder=False)),
        Part(f"overhead {small}", 15, lambda suite: measure_overhead(suite.bench, small, suite.peak)),
        Part(f"overhead {large}", 15, lambda suite: measure_overhead(suite.bench, large, suite.peak)),
        Part(f"switches {small}", 40, partial(switches, case=small)),
        Part(f"micro-batch sizes {large}", 30, partial(micro_batch_sizes, case=large)),
        Part(f"attention {large}", 10, partial(back_ends, case=large)),
        Part(f"compile {small}", 90, partial(compiled, case=small), cuda=True),
    ]
    others = [("bge-reranker-v2-m3", "rte"), (MAIN, "long"), ("bge-large-en-v1.5", "rte"), ("bge-small-en-v1.5", "rte")]
    others += [(name, "long") for name in ("bge-reranker-v2-m3", "bge-large-en-v1.5", "bge-small-en-v1.5")]
    for model, lengths in others[:2] if bench.tiny else others:  # in the tiny form all BERTs are one
        case = bench.case(model, lengths, BATCHES[0])
        found.append(Part(f"compare {case}", 35, partial(compare, case=case, tuned=(1,))))
    found.append(Part(f"compiled peer {small}", 90, partial(compiled_peer, case=small), cuda=True))
    for model in [MAIN] if bench.tiny else FRACTIONS:
        found.append(Part(f"memory {model}", 150, partial(measure_memory, model=model)))
    return found


def planned(parts: list[Part], minutes: float) -> list[Part]:
    """The first parts, which fit into so many minutes by their estimates."""
    ends = accumulate(part.needs for part in parts)
    return [part for part, end in zip(parts, ends, strict=True) if end <= minutes * 60 - PEAK_SECONDS]


def run_parts(suite: Suite, parts: list[Part], save: Callable[[Suite], None]) -> None:
    """Run what there is time for; save after each part."""
    for part in parts:
        if part.cuda and suite.bench.device != "cuda":
            suite.skip(part.name, "needs CUDA: on a CPU it takes minutes")
        elif suite.left() < (0 if suite.bench.tiny else part.needs):
            suite.skip(part.name, f"{max(0.0, suite.left()):.0f} s were left, it needs about {part.needs:.0f}")
        else:
            print(f"\n{part.name} ({suite.left():.0f} s left)", flush=True)
            began = suite.now()
            try:
                found = part.run(suite)
            except Exception as error:
                suite.fail(part.name, error)
                continue
            suite.parts[part.name] = {**found, "seconds": suite.now() - began}
            save(suite)


# The record


def save_record(suite: Suite, given: Namespace) -> None:
    """Write the record and the note."""
    result = {
        "weights": f"random, seed {suite.bench.seed}",
        "peak_flops_per_s": suite.peak,
        "seconds": suite.now() - suite.began,
        "parts": suite.parts,
        "skipped": suite.skipped,
        "failed": suite.failed,
    }
    write_record(given.out, "gpu_suite", given, result)
    record = json.loads(Path(given.out).read_text(encoding="utf-8"))
    Path(given.out).with_suffix(".md").write_text(note_of(record), encoding="utf-8")


# The command line


def parse(args: list[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(description="Training speed on one GPU.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--minutes", type=float, default=8, help="what the parts may take together (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="untimed steps of a run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of a run (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="a run is timed no longer (default: %(default)s)")
    parser.add_argument(
        "--parts", nargs="+", help="all parts with one of these words in their name, as long as there is time"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and rows (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="narrow models and few steps: shows that everything runs")
    parser.add_argument("--out", default=str(REPOSITORY / "docs/benchmarks/gpu_suite.json"), help="the record, JSON")
    given = parser.parse_args(args)
    if given.device == "auto":
        given.device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: --tiny --device cpu shows that the suite runs")
    if given.device == "cpu" and not given.tiny:
        raise SystemExit("the whole suite needs a GPU: --tiny --device cpu shows that it runs")
    if min(given.warmup, given.steps, given.rounds) < 1:
        raise SystemExit("--warmup, --steps and --rounds: expected 1 or more")
    if given.tiny:
        given.warmup, given.steps, given.rounds = 1, 2, 1
    return given


def main(args: list[str] | None = None) -> None:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the Trainer would train on all GPUs, with another batch
    given = parse(args)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    gc.freeze()  # else each collection, of which a run has two, takes 0.3 s to look through what the libraries hold
    try:
        with tempfile.TemporaryDirectory() as folder, quiet_transformers():
            suite = run_suite(given, folder)
    finally:
        gc.unfreeze()
    print(f"\n{given.out}: {len(suite.parts)} parts, {len(suite.skipped)} skipped, {len(suite.failed)} failed")
    if suite.failed:
        sys.exit("failed: " + "; ".join(entry["what"] for entry in suite.failed))


def run_suite(given: Namespace, folder: str) -> Suite:
    """Run the chosen parts, and write the record."""
    bench = Bench(given.device, Path(folder), Limit(given.warmup, given.steps, given.seconds), given.tiny, given.seed)
    parts = all_parts(bench)
    everything = given.parts is None and given.tiny
    chosen = [part for part in parts if everything or any(word in part.name for word in given.parts or [])]
    if given.parts is None and not given.tiny:
        chosen = planned(parts, given.minutes)
        names = "; ".join(part.name for part in chosen)
        print(f"{len(chosen)} parts, about {sum(part.needs for part in chosen):.0f} s: {names}", flush=True)
    if not chosen:
        raise SystemExit(
            f"--parts: expected a word out of one of these names: {'; '.join(part.name for part in parts)}"
        )
    suite = Suite(bench, given.rounds, given.minutes)
    suite.peak = matmul_peak(bench.device, 1 if given.tiny else 5)["bf16"]
    given.model = bench.model_folder(MAIN)
    for part in parts[len(chosen) :] if given.parts is None else []:
        suite.skip(part.name, f"not among the first {given.minutes:g} minutes by the estimates: --parts names it")
    run_parts(suite, chosen, partial(save_record, given=given))
    save_record(suite, given)
    return suite


if __name__ == "__main__":
    main()
