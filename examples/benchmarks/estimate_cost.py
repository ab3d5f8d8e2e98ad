"""Seconds and memory of the corrected score of a large study, whose predictions are made up.

    python examples/benchmarks/estimate_cost.py

Each parameter set's validations are written as a study writes them, up to the step at which the default pruner stops
it, and `hpo.evaluation.estimate` is called as at the end of a study, in a new process for each metric, so that the peak
of its memory is its own. Number of threads: OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import git_commit, hardware, markdown_table, versions
from safetensors.torch import save_file
from selection_bias import prune

from lightning_bge.hpo.evaluation.candidates import Candidate, Target, Validation
from lightning_bge.hpo.evaluation.estimate import Contest, estimate
from lightning_bge.hpo.evaluation.resampling import ValidationRows
from lightning_bge.hpo.pruning.config import PrunerConfig, rungs
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.trial.kept_predictions import kept_file, load_logits
from lightning_bge.runtime.run_folder import write_json, write_text

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"
FOLDS, EPOCHS = 3, 3
TARGETS = {
    "f1": Target("binary", "f1", tuned=True),
    "accuracy": Target("binary", "accuracy"),
    "average_precision": Target("binary", "average_precision"),
}


def rows_of(count: int) -> ValidationRows:
    """Made-up rows, 30 % positive."""
    random = np.random.default_rng(0)
    return ValidationRows((random.random(count) < 0.3).astype(np.float32), np.arange(count) % FOLDS)


def write(folder: Path, trials: int, count: int) -> list[int]:
    """Write what a study with the default pruner keeps; returns each parameter set's last step."""
    random, rows, steps = np.random.default_rng(1), rows_of(count), Steps(FOLDS, EPOCHS)
    stages = [*rungs(PrunerConfig(), steps)[0], steps.total]
    last = prune(random.normal(size=(trials, len(stages))), len(stages) - 1)
    for number in range(trials):
        content = {}
        for step in range(1, stages[last[number]] + 1):
            labels = rows.labels[rows.of_fold[(step - 1) // EPOCHS]]
            content[str(step)] = torch.from_numpy(labels + random.normal(size=len(labels)).astype(np.float32))[:, None]
        save_file(content, kept_file(folder, number))
    return [stages[stage] for stage in last]


def measure(name: str, folder: Path, count: int, last: list[int]) -> dict[str, Any]:
    """One estimate, in this process."""

    def candidate(number: int) -> Candidate:
        def load() -> list[Validation]:
            return [Validation(step, found.numpy()) for step, found in load_logits(kept_file(folder, number)).items()]

        return Candidate(number, last[number], load)

    candidates = [candidate(number) for number in range(len(last))]
    contest = Contest(
        target=TARGETS[name], rows=rows_of(count), steps=Steps(FOLDS, EPOCHS), candidates=candidates, replicates={}
    )
    before, cpu = time.perf_counter(), time.process_time()
    found = estimate(contest)
    assert found.corrected is not None
    return {
        "metric": name,
        "seconds": time.perf_counter() - before,
        "cpu_seconds": time.process_time() - cpu,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000, help="default 2,000")
    parser.add_argument("--rows", type=int, default=10_000, help="default 10,000")
    parser.add_argument("--out", type=Path, default=DOCS / "estimate_cost.json")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        last = json.loads((chosen.folder / "last.json").read_text())
        print(json.dumps(measure(chosen.measure, chosen.folder, chosen.rows, last)))
        return
    found = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "last.json").write_text(json.dumps(write(folder, chosen.trials, chosen.rows)))
        size = sum(path.stat().st_size for path in folder.iterdir()) / 2**30
        for name in TARGETS:
            command = [sys.executable, __file__, "--measure", name, "--folder", place, "--rows", str(chosen.rows)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout))
    record = {
        "written": time.strftime("%Y-%m-%d"),
        "git_commit": git_commit(),
        "hardware": hardware(),
        "versions": versions(),
        "trials": chosen.trials,
        "rows": chosen.rows,
        "predictions_gib": size,
        "estimates": found,
    }
    write_json(chosen.out, record)
    write_text(chosen.out.with_suffix(".md"), text := note(record))
    print(text)


def note(record: dict[str, Any]) -> str:
    """The Markdown beside the JSON."""
    rows = [
        [one["metric"], f"{one['seconds']:.0f}", f"{one['cpu_seconds']:.0f}", f"{one['peak_gib']:.2f}"]
        for one in record["estimates"]
    ]
    return "\n".join(
        [
            "# What the corrected score of a large study takes",
            "",
            f"Written {record['written']} at commit {record['git_commit']} by `examples/benchmarks/estimate_cost.py`.",
            f"{record['trials']:,} parameter sets, {record['rows']:,} rows, {FOLDS} folds, {EPOCHS} epochs, the "
            f"default pruner; predictions of {record['predictions_gib']:.2f} GiB on the disk. Peak memory is that of "
            "the process, torch and Lightning included.",
            "",
            markdown_table(["metric", "seconds", "CPU seconds", "peak memory, GiB"], rows),
            "",
        ]
    )


if __name__ == "__main__":
    main()
