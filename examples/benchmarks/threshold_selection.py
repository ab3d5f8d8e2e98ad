"""Which threshold a search should compare by: the tuned one that is exported, or 0.5.

    python examples/benchmarks/threshold_selection.py --seeds 20

Each seed generates an imbalanced sample and runs one search with the focal loss whose trials all run to their end. The
same trials are then compared a second time by F1 at 0.5, and that winner is trained and refitted too. Both models are
exported with a tuned threshold, and scored on the same test file. Number of threads: OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from common import flags, git_commit, hardware, markdown_table, versions
from scipy import stats

from lightning_bge.cli import main as cli
from lightning_bge.data.sample import write_sample
from lightning_bge.data.tables.readers import read_table
from lightning_bge.hpo.storage.journal import open_storage
from lightning_bge.hpo.trial.kept_predictions import kept_file, load_logits
from lightning_bge.models.metrics.compute import compute_metrics
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.models.tiny_bert import build_tiny_bert
from lightning_bge.runtime.run_folder import write_json, write_text
from lightning_bge.types import Schema

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"
FOLDS, EPOCHS = 3, 3
POSITIVE = 5  # of so many positive rows one is kept
SPACE = """{
    model.optimizer.lr: {low: 5.0e-4, high: 1.0e-2, log: true},
    model.loss.focal_gamma: {low: 0.0, high: 5.0},
    model.loss.class_weights: {choices: [null, balanced]},
    model.dropout: {choices: [0.0, 0.1]}
}"""


def imbalanced(source: Path, target: Path, seed: int) -> None:
    """All negative rows and a part of the positive ones, with the file's columns."""
    with source.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    drawn = random.Random(seed)
    kept = [row for row in rows if row["label"] == "0" or drawn.random() < 1 / POSITIVE]
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)


def search(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    """Run one search, or what is missing of it; returns its summary."""
    given = {
        "run_dir": folder / name,
        "model.name_or_path": folder / "model",
        "model.loss.name": "focal",
        "data.train_file": folder / "train-imbalanced.csv",
        "data.test_file": folder / "test-imbalanced.csv",
        "data.text_columns": "[text, criterion]",
        "data.group_column": "post_id",
        "data.split.folds": FOLDS,
        "trainer.max_epochs": EPOCHS,
        "trainer.precision": "32-true",
        "compile.policy": "never",
        "hpo.space": SPACE,
        "hpo.sampler.name": "random",
        "hpo.pruner.name": "none",
        "hpo.baseline": "false",
        **options,
    }
    cli.main(["hpo", *flags(given)])
    found: dict[str, Any] = json.loads((folder / name / "summary.json").read_text())
    return found


def at_half(run: Path) -> tuple[int, float]:
    """The trial that is best by the mean over the folds of the best epoch's F1 at 0.5, and that value."""
    study = optuna.load_study(study_name=run.name, storage=open_storage(run / "journal.log"))
    with (run / "oof.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels, fold = (np.array([float(row[name]) for row in rows]) for name in ("truth", "fold"))
    schema = Schema("binary", ("0", "1"), ("text",), 1)
    values = {}
    for trial in study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
        each: dict[int, list[float]] = {}
        for step, logits in load_logits(kept_file(run / "predictions", trial.number)).items():
            number = (step - 1) // EPOCHS
            truth = torch.tensor(labels[fold == number])
            each.setdefault(number, []).append(
                compute_metrics(schema, Predictions(torch.arange(len(truth)), logits, truth))["f1"]
            )
        values[trial.number] = float(np.mean([max(found) for found in each.values()]))
    best = max(values, key=lambda number: values[number])
    return best, values[best]


def one_seed(seed: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Both selections with one seed."""
    folder = chosen.work / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "test-imbalanced.csv").is_file():
        write_sample(folder, chosen.posts, test_posts=chosen.posts, seed=seed)
        table = read_table(folder / "train.csv", ("text", "criterion"), label_column=None)
        build_tiny_bert(folder / "model", [text for row in table.texts for text in row], seed=seed)
        for name in ("train", "test"):
            imbalanced(folder / f"{name}.csv", folder / f"{name}-imbalanced.csv", seed)
    seeds = {"seed_everything": seed, "hpo.sampler.seed": seed}
    tuned = search(folder, "tuned", **seeds, **{"hpo.n_trials": chosen.trials})
    number, value = at_half(folder / "tuned")
    run = folder / "tuned"
    params = optuna.load_study(study_name=run.name, storage=open_storage(run / "journal.log")).trials[number].params
    again = {"hpo.n_trials": 1, "hpo.enqueue": json.dumps([params]), "monitor.threshold": "fixed"}
    fixed = search(folder, "fixed", **seeds, **again)
    if abs(fixed["best_value"] - value) > 1e-6:
        raise SystemExit(f"seed {seed}: trial {number} had {value} at 0.5, and now has {fixed['best_value']}")
    found: dict[str, Any] = {"seed": seed, "same_trial": number == tuned["best_trial"]}
    for name, one in (("tuned", tuned), ("fixed", fixed)):
        found |= {name: one["test"]["f1"], f"{name}_selected": one["best_value"], f"{name}_params": one["best_params"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="how many; default 20")
    parser.add_argument("--trials", type=int, default=12, help="default 12")
    parser.add_argument("--posts", type=int, default=500, help="of a sample; default 500")
    parser.add_argument("--work", type=Path, default=Path("runs/threshold_selection"))
    parser.add_argument("--out", type=Path, default=DOCS / "threshold_selection.json")
    chosen = parser.parse_args()
    found = [one_seed(seed, chosen) for seed in range(chosen.seeds)]
    difference = np.array([one["tuned"] - one["fixed"] for one in found])
    error = float(difference.std(ddof=1) / len(difference) ** 0.5)
    half = float(stats.t.ppf(0.975, len(difference) - 1)) * error
    record = {
        "written": time.strftime("%Y-%m-%d"),
        "git_commit": git_commit(),
        "hardware": hardware(),
        "versions": versions(),
        "options": {name: getattr(chosen, name) for name in ("seeds", "trials", "posts")},
        "mean_difference": float(difference.mean()),
        "interval": [float(difference.mean()) - half, float(difference.mean()) + half],
        "seeds": found,
    }
    write_json(chosen.out, record)
    write_text(chosen.out.with_suffix(".md"), text := note(record))
    print(text)


def note(record: dict[str, Any]) -> str:
    """The Markdown beside the JSON."""
    low, high = record["interval"]
    rows = []
    for one in record["seeds"]:
        values = (one["tuned"], one["fixed"], one["tuned"] - one["fixed"])
        rows.append([one["seed"], *(f"{value:.4f}" for value in values), "yes" if one["same_trial"] else "no"])
    means = [f"{np.mean([one[name] for one in record['seeds']]):.4f}" for name in ("tuned", "fixed")]
    options = record["options"]
    header = ["seed", "selected at the tuned threshold", "selected at 0.5", "difference", "same trial"]
    return "\n".join(
        [
            "# Comparing trials at the tuned threshold or at 0.5",
            "",
            f"Written {record['written']} at commit {record['git_commit']} by "
            "`examples/benchmarks/threshold_selection.py`.",
            f"An imbalanced generated sample ({options['posts']} posts), focal loss, {options['trials']} trials with "
            f"{FOLDS} folds and {EPOCHS} epochs; F1 of the exported model on the test file, at its tuned threshold.",
            "",
            f"Mean paired difference, tuned less 0.5: {record['mean_difference']:+.4f} "
            f"(95 % interval {low:+.4f} to {high:+.4f}, {len(rows)} seeds); means {means[0]} and {means[1]}.",
            "",
            markdown_table(header, rows),
        ]
    )


if __name__ == "__main__":
    main()
