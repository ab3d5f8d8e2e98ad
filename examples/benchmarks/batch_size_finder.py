"""MicroBatchFinder against Lightning's BatchSizeFinder, under limits on the address space (RLIMIT_AS).

    python examples/benchmarks/batch_size_finder.py

Three ordinary modules: an MLP, a small CNN, a small transformer. First ours alone: it finds a batch size and trains an
epoch under each of many limits, and must not run out of memory. Then both take turns under some of the limits, each run
in a process of its own, and the samples per second of the training epoch that follows the search are compared.
Lightning's may search up to the effective batch that ours is asked for, in its default mode. Number of threads:
OMP_NUM_THREADS. Give the machine nothing else to do meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from batch_size_run import FINDERS, KINDS
from common import git_commit, hardware, markdown_table, versions

from lightning_bge.runtime.run_folder import write_json, write_text

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"
RUN = Path(__file__).with_name("batch_size_run.py")


def rooms(count: int, least: int, most: int) -> list[int]:
    """MiB of so many limits, evenly spaced by their ratio."""
    return [round(least * (most / least) ** (number / max(count - 1, 1))) for number in range(count)]


def run(finder: str, kind: str, room: int, share: float) -> dict[str, Any]:
    """A run in a process of its own; one that is killed, or says nothing, has ended by its exit status."""
    command = [sys.executable, str(RUN), finder, kind, str(room), str(share)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    known = {"finder": finder, "module": kind, "room_mib": room, "batch_size": 0, "samples_per_s": None}
    found = json.loads(lines[-1]) if lines else {**known, "end": f"exit status {done.returncode}"}
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def compare(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each module and limit: the samples per second of both, where all of their runs have finished.

    The ratio is the median of those of the rounds: what slows the machine down for minutes slows both of a round.
    """
    found = []
    for kind, room in dict.fromkeys((one["module"], one["room_mib"]) for one in runs):
        of = {
            finder: [one for one in runs if (one["finder"], one["module"], one["room_mib"]) == (finder, kind, room)]
            for finder in FINDERS
        }
        row: dict[str, Any] = {"module": kind, "room_mib": room}
        for finder, each in of.items():
            speeds = [one["samples_per_s"] for one in each]
            row[finder] = {
                "batch_sizes": [one["batch_size"] for one in each],
                "ends": sorted({one["end"] for one in each}),
                "samples_per_s": None if None in speeds else median(speeds),
            }
        ours, theirs = ([one["samples_per_s"] for one in of[finder]] for finder in FINDERS)
        finished = None not in (*ours, *theirs)
        row["ratio"] = median(own / other for own, other in zip(ours, theirs, strict=True)) if finished else None
        found.append(row)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limits", type=int, default=20, help="limits for each module; default 20")
    parser.add_argument("--timed-limits", type=int, default=3, help="of both, in turns; default 3")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--rooms", type=int, nargs=2, default=[100, 1500], help="MiB above what is held; 100 1500")
    parser.add_argument("--share", type=float, default=1.0, help="of each module's rows; default 1")
    parser.add_argument("--out", type=Path, default=DOCS / "batch_size_finder.json")
    chosen = parser.parse_args(arguments)
    limits, timed = (rooms(count, *chosen.rooms) for count in (chosen.limits, chosen.timed_limits))
    alone = [run("ours", kind, room, chosen.share) for room in limits for kind in KINDS]
    turns = [(kind, room) for _ in range(chosen.rounds) for room in timed for kind in KINDS]
    runs = [run(finder, kind, room, chosen.share) for kind, room in turns for finder in FINDERS]
    compared = compare(runs)
    record = {
        "written": time.strftime("%Y-%m-%d"),
        "git_commit": git_commit(),
        "hardware": hardware(),
        "versions": versions(),
        "modules": {kind: each._asdict() for kind, each in KINDS.items()},
        "arguments": {**vars(chosen), "out": chosen.out.name},
        "alone": alone,
        "in_turns": runs,
        "unfinished": sum(one["end"] != "finished" for one in alone),
        "compared": compared,
        "lowest_ratio": min((row["ratio"] for row in compared if row["ratio"] is not None), default=None),
    }
    write_json(chosen.out, record)
    write_text(chosen.out.with_suffix(".md"), text := note(record))
    print(text)


def note(record: dict[str, Any]) -> str:
    """The Markdown beside the JSON."""
    header = ["module", "limit, MiB", *(f"{name}: {what}" for name in FINDERS for what in ("sizes", "samples/s"))]
    rows = []
    for row in record["compared"]:
        cells = [row["module"], f"{row['room_mib']:,}"]
        for finder in FINDERS:
            found = row[finder]
            speed = ", ".join(found["ends"]) if found["samples_per_s"] is None else f"{found['samples_per_s']:,.0f}"
            cells += [", ".join(map(str, found["batch_sizes"])), speed]
        rows.append([*cells, "" if row["ratio"] is None else f"{row['ratio']:.2f}"])
    lowest = record["lowest_ratio"]
    return "\n".join(
        [
            "# Batch size finders",
            "",
            f"Written {record['written']} at commit {record['git_commit']} by "
            "`examples/benchmarks/batch_size_finder.py`. Each run is a process whose address space is limited to so "
            "many MiB more than it has with module and data.",
            f"`MicroBatchFinder` (ours), {len(record['alone'])} runs: {record['unfinished']} did not finish.",
            "",
            markdown_table([*header, "ratio"], rows),
            "",
            "Speed is that of the training epoch after the search, the median of all rounds; sizes are those of each "
            "round. Ratios are medians of those of the rounds. Lowest ratio: "
            + ("none" if lowest is None else f"{lowest:.2f}")
            + ".",
            "",
        ]
    )


if __name__ == "__main__":
    main()
