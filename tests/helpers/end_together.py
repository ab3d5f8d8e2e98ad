"""Four processes that run the last trials of a study at the same time, and then its end, many times.

    python -m tests.helpers.end_together FOLDER REPETITIONS

Prints for each repetition how many times `summary.json` was written, how often a model was refitted, and the exit
statuses. All processes are forked from this one, which has imported everything.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning_bge.cli.commands.hpo  # noqa: F401 - what the processes need is imported once
from lightning_bge.cli.main import main as program
from lightning_bge.hpo.finish import results
from tests.tools.kill_everywhere import Search

PROCESSES = 4
NAMES = ("summaries", "refits")
PRUNERS = ("none", "asha")


def counted(function: Callable[..., Any], path: Path) -> Callable[..., Any]:
    """Adds a line to a file at each call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if args[0].name == "summary.json" if isinstance(args[0], Path) else True:
            with path.open("a") as file:
                file.write("x\n")
        return function(*args, **kwargs)

    return call


def child(search: Search, folder: Path, pruner: str, go: int) -> None:
    """Run the study as soon as the pipe is closed."""
    log = os.open(folder / f"{os.getpid()}.log", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    results.write_json = counted(results.write_json, folder / "summaries")
    results.refit = counted(results.refit, folder / "refits")
    more = ["--hpo.pruner.name", "none", "--hpo.pruner.reduction_factor", "4"] if pruner == "none" else []
    os.read(go, 1)
    program([*search.arguments(folder / "study"), *more])


def repeat(search: Search, folder: Path, pruner: str) -> dict[str, Any]:
    """One repetition."""
    folder.mkdir()
    read, write = os.pipe()
    pids = []
    for _ in range(PROCESSES):
        if not (pid := os.fork()):
            status = 1
            try:
                os.close(write)
                child(search, folder, pruner, read)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
    os.close(read)
    os.close(write)
    status = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    counts = {
        name: len((folder / name).read_text().split()) if (folder / name).exists() else 0
        for name in ("summaries", "refits")
    }
    logs = [path.read_text() for path in folder.glob("*.log")] if any(status) else []
    return {"status": status, **counts, "logs": logs}


def main() -> None:
    """Repeat it."""
    place = Path(sys.argv[1])
    search = Search(place, [])
    for number in range(int(sys.argv[2])):
        print(json.dumps(repeat(search, place / str(number), PRUNERS[number % len(PRUNERS)])), flush=True)


if __name__ == "__main__":
    main()
