"""The time of one search with several libraries: a fixed list of trials, and the time outside of their training.

    pip install -r examples/benchmarks/requirements.txt
    python examples/benchmarks/hpo_race.py --data FOLDER            # FOLDER/rte/train.tsv, dev.tsv
    python examples/benchmarks/hpo_race.py --data FOLDER --pruned   # a second table: searches that prune

Every contender runs the same trials (learning rate, weight decay, warm-up; drawn once from a fixed generator) on the
same rows, weights, seed, epochs and effective batch, in one process, and validates after each epoch. They take turns
(A B C A B C ...), each search in a fresh process. Number of threads: OMP_NUM_THREADS, the same for all. Give the
machine nothing else to do meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import searches
from common import Job, add_shared_arguments, check_shared_arguments, write_record
from measures import Run, fresh, medians_of, ratio_of, values_of, wait_for_device
from note import table, write_note
from peers import BATCH
from searches import NAMES, OURS, SEARCHES, SPACE, TRAINER_NAMES, Race, Trial

PRUNED = ", pruned"
DEFAULT = [OURS, "Trainer", "Trainer tuned 8x4", "CrossEncoderTrainer", "textbook Lightning"]
CAN_PRUNE = [name for name in SEARCHES if name != "CrossEncoderTrainer"]

DEFINITIONS = """\
- **wall**: from the call of the search to its return. Reading, tokenizing, loading weights and all that a trial needs
  is included; importing the libraries and the first step of a model, both before the search, are not.
- **inside training steps**: from the start of a step, its batch fetched, to its end, optimizer step included; a step is
  one effective batch.
- **inside validation**: from the validation loop's start to its end, metrics included.
- **outside**: wall minus both. Fetching and padding of training batches is in it; so is tokenizing where a library
  does it in its collator (sentence-transformers), and Lightning's sanity check.
- **best**: the highest accuracy on the validation rows after a trial's last epoch. sentence-transformers' evaluator
  reports the accuracy at the best threshold, so that its figures can't be compared with those of the others."""


def draw_trials(count: int, seed: int) -> tuple[Trial, ...]:
    """The fixed list: the same for the same seed, on every machine."""
    draw = random.Random(seed)

    def value(low: float, high: float, log: bool) -> float:
        if log:
            return math.exp(draw.uniform(math.log(low), math.log(high)))
        return draw.uniform(low, high)

    return tuple({name: float(f"{value(low, high, log):.4g}") for name, low, high, log in SPACE} for _ in range(count))


def head(source: Path, target: Path, rows: int) -> str:
    """A copy of a file's heading and first rows.

    Raises:
        SystemExit: the file has fewer.
    """
    with source.open(encoding="utf-8", newline="") as file:
        lines = list(islice(file, rows + 1))
    if len(lines) <= rows:
        raise SystemExit(f"{source} has {len(lines) - 1} rows, {rows} are asked for")
    target.write_text("".join(lines), encoding="utf-8", newline="")
    return str(target)


def run_contender(name: str, job: Job, trials: tuple[Trial, ...]) -> Run:
    """One search; what the libraries print goes to stderr."""
    base = name.removesuffix(PRUNED)
    searches.CLOCK.reset()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        race = Race(job, trials, folder, pruned=name.endswith(PRUNED))
        searches.import_all(base, job)
        wait_for_device()
        since = time.perf_counter()
        study = SEARCHES[base](race)
        wait_for_device()
        wall = time.perf_counter() - since
        return searches.summary_of(study, wall, searches.describe_trials(study, NAMES.get(base, TRAINER_NAMES)))


def check_same(name: str, run: Run, job: Job, trials: tuple[Trial, ...], rows: int) -> None:
    """Refuse a search that did other trials, or not all of their steps.

    Raises:
        RuntimeError: says what differs.
    """
    found = tuple(trial["params"] for trial in run["trials"])
    if found != trials:
        raise RuntimeError(f"{name} ran {found}, not {trials}")
    steps = len(trials) * job.epochs * math.ceil(rows / job.batch)
    pruned = run["pruned"] if name.endswith(PRUNED) else 0
    if run["steps"] > steps or (not pruned and run["steps"] != steps):
        raise RuntimeError(f"{name} made {run['steps']} training steps, {steps} were to be made")
    failed = [trial["number"] for trial in run["trials"] if trial["state"] not in ("COMPLETE", "PRUNED")]
    if failed or run["pruned"] != pruned:
        raise RuntimeError(f"{name}: trials {failed} did not finish, {run['pruned']} were pruned")


def measure(names: list[str], job: Job, trials: tuple[Trial, ...], rounds: int, rows: int) -> list[Run]:
    """All searches, in turns."""
    runs: list[Run] = []
    for number in range(1, rounds + 1):
        for name in names:
            load = os.getloadavg()[0]
            run = {"contender": name, "round": number, "load": load, **fresh(run_contender, name, job, trials)}
            check_same(name, run, job, trials, rows)
            if run["threads"] != (runs or [run])[0]["threads"]:
                raise RuntimeError(f"{name} had {run['threads']} threads, {runs[0]['contender']} had others")
            runs.append(run)
            print(f"round {number}, {name}: {run['wall_seconds']:.1f} s, best {run['best_value']:.4f}", flush=True)
    return runs


FIELDS = (
    "wall_seconds",
    "training_seconds",
    "validation_seconds",
    "outside_seconds",
    "outside_share",
    "pruned",
    "best_value",
    "peak_memory_mib",
)


def summarize(runs: list[Run], names: list[str]) -> dict[str, Any]:
    """Medians, and ratios of wall time between each peer and ours; pruned searches among themselves."""
    ratios = {}
    for peer in names:
        ours = OURS + PRUNED if peer.endswith(PRUNED) else OURS
        if peer == ours or ours not in names:
            continue
        ratios[f"{ours} / {peer}"] = ratio_of(*(values_of(runs, name, "wall_seconds") for name in (peer, ours)))
    return {"medians": medians_of(runs, names, FIELDS), "ratios": ratios}


def tables(summary: dict[str, Any]) -> list[str]:
    """The tables of the summary: the fixed list, pruned searches, ratios."""
    header = (
        "median of the rounds",
        "wall s",
        "training s",
        "validation s",
        "outside s",
        "outside %",
        "pruned",
        "best",
    )
    made = []
    for pruned in (False, True):
        rows = []
        for name, found in summary["medians"].items():
            seconds = [found[f"{part}_seconds"] for part in ("wall", "training", "validation", "outside")]
            if name.endswith(PRUNED) == pruned:
                rows.append((name, *seconds, 100 * found["outside_share"], found["pruned"], found["best_value"]))
        if rows:
            made.append(table(header, rows))
    ratios = [(k, r["of_medians"], min(r["by_round"]), max(r["by_round"])) for k, r in summary["ratios"].items()]
    if ratios:
        made.append(table(("times less wall time", "of medians", "lowest round", "highest round"), ratios))
    return made


def note_sections(record: dict[str, Any], job: Job, given: argparse.Namespace) -> list[str]:
    """What the note says besides machine and command."""
    trials = [(number, *map(str, trial.values())) for number, trial in enumerate(record["fixed_trials"])]
    about = (
        f"{given.trials} trials on the first {given.rows} training pairs of RTE, {job.epochs} epochs each, validated "
        f"on the first {given.val_rows} pairs of dev after each epoch; effective batch {job.batch}, one seed for all "
        f"trials, as in a search of lightning-bge. {given.rounds} rounds in turns, each search in a fresh process. The "
        "list of trials is fixed and the same for all."
    )
    contenders = (
        "lightning-bge runs `lightning-bge hpo` with its defaults, without refit and baseline. The Trainer and the "
        "CrossEncoderTrainer run their `hyperparameter_search(backend='optuna')` with default arguments; *tuned* means "
        "bf16, length grouping, fused AdamW, micro-batches x accumulation as named. Textbook Lightning is a module "
        "with automatic optimization in fp32 under `study.optimize`, whose trials read, tokenize and load for "
        "themselves. Where trials are pruned, lightning-bge has its default pruner and the others have Optuna's "
        "MedianPruner: they then prune different trials, so that the work differs too."
    )
    fixed = table(("trial", *(name for name, *_ in SPACE)), trials)
    return [about, contenders, *tables(record), DEFINITIONS, "## The trials", fixed]


def parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Searches for the same trials, against the peers, on RTE.")
    add_shared_arguments(parser, "docs/benchmarks/hpo_race.json", lr=None)
    parser.add_argument("--contenders", nargs="+", choices=tuple(SEARCHES), help=f"(default: {', '.join(DEFAULT)})")
    parser.add_argument("--pruned", action="store_true", help="searches that prune, too, where a contender can")
    parser.add_argument("--trials", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=320, help="training pairs (default: %(default)s)")
    parser.add_argument("--val-rows", type=int, default=100, help="validation pairs (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="searches of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the trials' list and of every trial")
    given = parser.parse_args(args)
    check_shared_arguments(given)
    missing = [package for package in ("sentence_transformers", "datasets") if find_spec(package) is None]
    if missing and given.contenders and "CrossEncoderTrainer" in given.contenders:
        raise SystemExit(f"CrossEncoderTrainer needs {', '.join(missing)}")
    if missing and not given.contenders:
        print(f"left out, as {', '.join(missing)} is not installed: CrossEncoderTrainer")
    given.contenders = given.contenders or [name for name in DEFAULT if not missing or name != "CrossEncoderTrainer"]
    return given


def main(args: list[str] | None = None) -> None:
    given = parse(args)
    trials = draw_trials(given.trials, given.seed)
    pruned = [name + PRUNED for name in given.contenders if name in CAN_PRUNE] if given.pruned else []
    names = [*given.contenders, *pruned]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(given.data, "rte")
        job = Job(
            model=given.model,
            train_file=head(source / "train.tsv", Path(folder, "train.tsv"), given.rows),
            dev_file=head(source / "dev.tsv", Path(folder, "dev.tsv"), given.val_rows),
            task="binary",
            text_columns=("sentence1", "sentence2"),
            label_column="label",
            labels=("not_entailment", "entailment"),
            device=given.device,
            epochs=given.epochs,
            seed=given.seed,
            batch=BATCH,
        )
        runs = measure(names, job, trials, given.rounds, given.rows)
    summary = summarize(runs, names)
    print("", *tables(summary), "", sep="\n\n")
    hidden = ("model", "train_file", "dev_file", "lr")
    record = {
        "data": f"rte/train.tsv, first {given.rows} rows; rte/dev.tsv, first {given.val_rows}",
        "job": {name: value for name, value in asdict(job).items() if name not in hidden},
        "fixed_trials": trials,
        **summary,
        "runs": runs,
    }
    write_record(given.out, "hpo_race", given, record)
    title = "Time of the same search with several libraries"
    print(f"{given.out}\n{write_note(given.out, title, note_sections(record, job, given))}")


if __name__ == "__main__":
    main()
