"""Peak memory of `lightning-bge predict` at 100,000 and at 1,000,000 rows.

    python examples/benchmarks/predict_memory.py

The rows are those of `lightning-bge sample`, drawn with replacement, and the model is the sample's, which is trained
first. Each prediction is a process of its own, whose peak is what the system says of it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from common import git_commit, hardware, markdown_table, versions

from lightning_bge.runtime.run_folder import write_json, write_text

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"
PROGRAM = [sys.executable, "-m", "lightning_bge.cli"]
OPTIONS = ("--data.text_columns", "[text, criterion]", "--data.max_length", "64")


def prepare(folder: Path) -> None:
    """Write the sample, and train its model for an epoch."""
    quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*PROGRAM, "sample", str(folder / "sample")], **quiet)
    files = ("--data.train_file", str(folder / "sample" / "train.csv"), "--data.cache_dir", str(folder / "cache"))
    model = ("--model.name_or_path", str(folder / "sample" / "model"), "--run_dir", str(folder / "run"))
    subprocess.run([*PROGRAM, "fit", *files, *model, *OPTIONS, "--trainer.max_epochs", "1"], **quiet)


def write_rows(folder: Path, rows: int) -> Path:
    """A file of so many rows, and an id for each."""
    path = folder / f"{rows}.csv"
    with (folder / "sample" / "train.csv").open(newline="") as file:
        known = [(row["text"], row["criterion"]) for row in csv.DictReader(file)]
    random = Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "criterion"])
        writer.writerows((number, *random.choice(known)) for number in range(rows))
    return path


def predict(folder: Path, path: Path, ending: str) -> dict[str, Any]:
    """Predict a file in a process of its own; its peak memory and seconds."""
    output = folder / f"scores{ending}"
    model = ("--model.name_or_path", str(folder / "run" / "model"), "--data.predict_file", str(path))
    with (folder / "log").open("w") as log:
        before = time.perf_counter()
        command = [*PROGRAM, "predict", *model, *OPTIONS, "--output", str(output)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - before
    if status:
        raise SystemExit((folder / "log").read_text())
    found = {"output_mib": output.stat().st_size / 2**20, "seconds": seconds, "peak_mib": usage.ru_maxrss / 2**10}
    output.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000], help="default 100000 1000000")
    parser.add_argument("--endings", nargs="+", default=[".csv"], help="of the output; default .csv")
    parser.add_argument("--out", type=Path, default=DOCS / "predict_memory.json")
    chosen = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        for rows in chosen.rows:
            path = write_rows(folder, rows)
            for ending in chosen.endings:
                one = {"rows": rows, "format": ending, "input_mib": path.stat().st_size / 2**20}
                found.append(one | predict(folder, path, ending))
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
            path.unlink()
    record = {
        "written": time.strftime("%Y-%m-%d"),
        "git_commit": git_commit(),
        "hardware": hardware(),
        "versions": versions(),
        "predictions": found,
        "ratios": ratios(found),
    }
    write_json(chosen.out, record)
    write_text(chosen.out.with_suffix(".md"), text := note(record))
    print(text)


def ratios(found: list[dict[str, Any]]) -> dict[str, float]:
    """Of each format: the peak of the most rows, divided by that of the fewest."""
    by_format: dict[str, list[dict[str, Any]]] = {}
    for one in sorted(found, key=lambda each: each["rows"]):
        by_format.setdefault(one["format"], []).append(one)
    return {ending: each[-1]["peak_mib"] / each[0]["peak_mib"] for ending, each in by_format.items()}


def note(record: dict[str, Any]) -> str:
    """The Markdown beside the JSON."""
    header = ["rows", "format", "input, MiB", "output, MiB", "seconds", "peak memory, MiB"]
    rows = [
        [f"{one['rows']:,}", one["format"]]
        + [f"{one[name]:,.0f}" for name in ("input_mib", "output_mib", "seconds", "peak_mib")]
        for one in record["predictions"]
    ]
    compared = ", ".join(f"{ratio:.2f} ({ending})" for ending, ratio in record["ratios"].items())
    return "\n".join(
        [
            "# Peak memory of predictions",
            "",
            f"Written {record['written']} at commit {record['git_commit']} by `examples/benchmarks/predict_memory.py`.",
            "The rows and the model are those of `lightning-bge sample`. Peak memory is that of the process, torch and",
            "Lightning included; seconds are those of the whole command, on a machine that others use too.",
            "",
            markdown_table(header, rows),
            "",
            f"The peak at the most rows, divided by that at the fewest: {compared}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
