"""Quality: does lightning-bge's faster training cost accuracy? Against transformers' Trainer on two data sets.

    pip install -r examples/benchmarks/requirements.txt
    python examples/benchmarks/quality.py --data FOLDER                # FOLDER/sick, FOLDER/trecqa

SICK entailment (3 classes, cross-entropy): accuracy on dev. TREC QA (one logit, binary cross-entropy with a positive
weight of 5): MAP and MRR on dev, over the questions that have a right answer. Both sides have the same weights, rows,
epochs, effective batch of 32, learning rate, linear schedule without warm-up, AdamW without weight decay, clipping at
1, and the dropout of the checkpoint; lightning-bge trains in bf16, its default, the Trainer in fp32, its default.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from common import (
    Job,
    add_shared_arguments,
    build_ours,
    build_trainer,
    check_shared_arguments,
    describe_ours,
    describe_trainer,
    encode,
    write_record,
)
from note import table, write_note

from lightning_bge.data.tables.readers import Table
from lightning_bge.types import Task

OURS, PEER = "lightning-bge", "Trainer"
Outcome = tuple[np.ndarray, dict[str, Any]]  # logits [rows, outputs] and the settings


@dataclass(frozen=True)
class DataSet:
    """Where a data set's rows are, and what is asked of them."""

    ending: str
    task: Task
    text_columns: tuple[str, ...]
    label_column: str
    labels: tuple[str, ...]
    group_column: str | None = None
    positive_weight: float | None = None


DATA_SETS = {
    "sick": DataSet(
        ending="tsv",
        task="multiclass",
        text_columns=("sentence_A", "sentence_B"),
        label_column="entailment_judgment",
        labels=("CONTRADICTION", "ENTAILMENT", "NEUTRAL"),
    ),
    "trecqa": DataSet(
        ending="csv",
        task="binary",
        text_columns=("qtext", "atext"),
        label_column="label",
        labels=("0", "1"),
        group_column="qtext",
        positive_weight=5.0,
    ),
}


def make_job(name: str, given: argparse.Namespace) -> Job:
    """The job of a data set; the seed is set later."""
    chosen = DATA_SETS[name]
    files = [str(Path(given.data, name, f"{part}.{chosen.ending}")) for part in ("train", "dev")]
    return Job(
        model=given.model,
        train_file=files[0],
        dev_file=files[1],
        task=chosen.task,
        text_columns=chosen.text_columns,
        label_column=chosen.label_column,
        labels=chosen.labels,
        group_column=chosen.group_column,
        positive_weight=chosen.positive_weight,
        device=given.device,
        rows=given.rows,
        epochs=given.epochs,
        lr=given.lr,
    )


def train_ours(job: Job, dev: Table, folder: str, precision: str) -> Outcome:
    trainer, module, data = build_ours(job, folder, precision)
    trainer.fit(module, datamodule=data)
    trainer.predict(module, datamodule=data)
    assert module.predictions is not None
    return module.predictions.logits.numpy(), describe_ours(module, data, precision)


def train_trainer(job: Job, dev: Table, folder: str) -> Outcome:
    trainer = build_trainer(job, encode(job, job.read(job.train_file, job.rows)), folder)
    trainer.train()
    unlabelled = [{name: value for name, value in row.items() if name != "labels"} for row in encode(job, dev)]
    return trainer.predict(unlabelled).predictions, describe_trainer(trainer)


def judge(job: Job, logits: np.ndarray, dev: Table) -> dict[str, float]:
    """Accuracy (multi-class), or MAP and MRR over the groups."""
    assert dev.labels is not None
    truth = [job.labels.index(str(label)) for label in dev.labels]
    if len(logits) != len(truth):
        raise RuntimeError(f"{len(logits)} predictions for {len(truth)} rows")
    if job.task == "multiclass":
        right = [int(np.argmax(row)) == label for row, label in zip(logits, truth, strict=True)]
        return {"accuracy": mean(map(float, right))}
    assert dev.groups is not None
    questions: dict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(dev.groups):
        questions[group].append(row)
    scores = [float(row[0]) for row in logits]
    ranked = [rank_positives([scores[i] for i in rows], [truth[i] for i in rows]) for rows in questions.values()]
    answered = [ranks for ranks in ranked if ranks]
    precisions = [mean(found / rank for found, rank in enumerate(ranks, 1)) for ranks in answered]
    return {"map": mean(precisions), "mrr": mean(1 / ranks[0] for ranks in answered)}


def rank_positives(scores: Sequence[float], labels: Sequence[int]) -> list[int]:
    """Ranks (from 1, ascending) of the positive rows, best score first.

    Among equal scores the negatives come first, so that a model gains nothing by giving the same score twice.
    """
    order = sorted(range(len(scores)), key=lambda row: (-scores[row], labels[row]))
    return [rank for rank, row in enumerate(order, 1) if labels[row] == 1]


def compare(job: Job, seeds: Sequence[int], precision: str) -> dict[str, Any]:
    """Train both sides with each seed, and compare them seed by seed."""
    assert job.dev_file is not None
    dev = job.read(job.dev_file)
    contenders: dict[str, Callable[[Job, str], Outcome]] = {
        OURS: lambda job, folder: train_ours(job, dev, folder, precision),
        PEER: lambda job, folder: train_trainer(job, dev, folder),
    }
    runs: list[dict[str, Any]] = []
    configs = {}
    for seed in seeds:
        for name, train in contenders.items():
            with tempfile.TemporaryDirectory() as folder:
                logits, configs[name] = train(replace(job, seed=seed), folder)
            runs.append({"contender": name, "seed": seed, **judge(job, logits, dev)})
            print(runs[-1], flush=True)
    metrics = [name for name in runs[0] if name not in ("contender", "seed")]
    shared = {name: value for name, value in asdict(job).items() if name not in ("model", "train_file", "dev_file")}
    return {
        "job": {name: value for name, value in shared.items() if name != "seed"},
        "contenders": {name: {k: v for k, v in config.items() if k != "seed"} for name, config in configs.items()},
        "metrics": {metric: summarize(runs, metric) for metric in metrics},
        "majority": majority(job, dev) if job.task == "multiclass" else None,
        "runs": runs,
    }


def summarize(runs: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Mean and standard deviation over the seeds; the difference is ours minus the peer's, seed by seed."""
    ours, peer = ([run[metric] for run in runs if run["contender"] == name] for name in (OURS, PEER))
    difference = [a - b for a, b in zip(ours, peer, strict=True)]
    return {OURS: spread(ours), PEER: spread(peer), "difference": spread(difference)}


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation and the mean's standard error; None for the latter two with one value."""
    deviation = stdev(values) if len(values) > 1 else None
    error = None if deviation is None else deviation / sqrt(len(values))
    return {"mean": mean(values), "std": deviation, "standard_error": error, "values": values}


def majority(job: Job, dev: Table) -> float:
    """Accuracy of always giving the class that is most frequent on dev."""
    assert dev.labels is not None
    return max(dev.labels.count(name) for name in job.labels) / len(dev.labels)


def summary_table(found: dict[str, Any]) -> str:
    """Mean ± standard deviation over the seeds of each data set and metric."""

    def show(part: dict[str, Any]) -> str:
        return f"{part['mean']:.4f}" + ("" if part["std"] is None else f" ± {part['std']:.4f}")

    rows = [
        (name, metric, *(show(values[side]) for side in (OURS, PEER, "difference")))
        for name, result in found.items()
        for metric, values in result["metrics"].items()
    ]
    return table(("data set", "metric on dev", OURS, PEER, "difference, seed by seed"), rows)


def note_sections(given: argparse.Namespace, found: dict[str, Any]) -> list[str]:
    """What the note says besides machine and command."""
    rows = "all training rows" if given.rows is None else f"the first {given.rows} training rows"
    about = (
        f"lightning-bge in {given.precision} against transformers' Trainer with its defaults (fp32): {rows}, epochs: "
        f"{given.epochs}, effective batch 32, learning rate {given.lr:g}, linear schedule without warm-up, AdamW "
        f"without weight decay, clipping at 1, the dropout of the checkpoint; seeds {given.seeds}. Mean ± standard "
        "deviation over the seeds, on the whole dev file; the difference is ours minus the Trainer's, seed by seed."
    )
    counted = "MAP and MRR count the questions that have a right answer; among equal scores the wrong ones come first."
    return [about, summary_table(found), counted]


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Quality against transformers' Trainer, on SICK and TREC QA.")
    add_shared_arguments(parser, "docs/benchmarks/quality.json", lr=1e-4)
    parser.add_argument("--sets", nargs="+", choices=tuple(DATA_SETS), default=list(DATA_SETS), help="data sets")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--epochs", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, help="only the first training rows (default: all)")
    parser.add_argument("--precision", default="bf16-mixed", help="of lightning-bge (default: %(default)s)")
    given = parser.parse_args(args)
    check_shared_arguments(given)
    found = {name: compare(make_job(name, given), given.seeds, given.precision) for name in given.sets}
    print(f"\n{summary_table(found)}\nmean ± standard deviation over the seeds")
    write_record(given.out, "quality", given, {"results": found})
    print(f"{given.out}\n{write_note(given.out, 'Quality', note_sections(given, found))}")


if __name__ == "__main__":
    main()
