"""Stops a search at each of its writes in turn, and lets the same command finish it.

    python tests/tools/kill_everywhere.py                  # each kind of write once, in some minutes
    python tests/tools/kill_everywhere.py --all --json F   # every write

The list of writes is not written down anywhere: an audit hook sees every file that the process opens for writing,
renames or deletes in the run folder, the records of the study's storage among them. One undisturbed search yields the
list. Then, for each write, a process that is forked from this one, which has imported everything, ends with `os._exit`
right before it (which is right after the write before), or after half of it; so no `finally` runs. The same command
then has to end the search with the same best trial, and to leave no trial running.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KILLED = 9
HALF = ("before", "half")
QUIET = (".lock", ".guard")  # files without content


@dataclass(frozen=True)
class Write:
    """One write of the undisturbed search.

    Attributes:
        number: its place among all writes, from 0.
        kind: what is done to which file from where, without numbers.
        half: whether it can be left half done.
    """

    number: int
    kind: str
    half: bool


class Recorder:
    """An audit hook that counts the writes below a folder, and ends the process at one of them.

    Args:
        folder: the run folder.
        kill_at: the number of the write; None: none.
        half: whether the write before it is cut in half.
    """

    def __init__(self, folder: Path, kill_at: int | None = None, half: bool = False) -> None:
        self.folder, self.kill_at, self.half = str(folder), kill_at, half
        self.writes: list[Write] = []
        self.last: str | None = None
        self.size = 0

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        path = self._written(event, args)
        if path is None:
            return
        if len(self.writes) == self.kill_at:
            if self.half:
                self._cut()
            os._exit(KILLED)
        self.writes.append(Write(len(self.writes), f"{event} {_shape(path)} in {_caller()}", event == "open"))
        self.last = path if event == "open" else args[0] if event == "os.rename" else None
        self.size = os.path.getsize(path) if self.last and os.path.isfile(path) else 0

    def _written(self, event: str, args: tuple[Any, ...]) -> str | None:
        """The path in the folder that is written to; None: something else happens."""
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            return None
        path = args[1] if event == "os.rename" else args[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        path = os.fsdecode(path)
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return None
        if event in ("os.remove", "os.rmdir") and args[1] != -1:  # shutil.rmtree names the folder by a descriptor
            return os.path.join(self.folder, path)
        inside = path.startswith(self.folder) and not path.endswith(QUIET)
        return path if inside else None

    def _cut(self) -> None:
        """Leave half of what was written last: what a kill or a full disk may leave of a buffer."""
        self.kill_at = None  # truncating is a write as well
        if self.last is not None and os.path.isfile(self.last):
            size = os.path.getsize(self.last)
            os.truncate(self.last, self.size + (size - self.size) // 2 if size > self.size else size)


def _shape(path: str) -> str:
    name = os.path.basename(path)
    return "".join("N" if char.isdigit() else char for char in name.split("-")[0]).lstrip(".")


def _caller() -> str:
    """The innermost frame of the package."""
    frame: Any = sys._getframe(2)
    while frame is not None and "/lightning_bge/" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return "a library"
    outer = frame.f_back
    while outer is not None and "/lightning_bge/hpo/" not in outer.f_code.co_filename:
        outer = outer.f_back
    place = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
    return place if outer is None else f"{place} < {Path(outer.f_code.co_filename).name}:{outer.f_code.co_name}"


def in_child(call: Callable[[], None], log: Path) -> int:
    """Call a function in a forked process; returns its exit status."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        call()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Search:
    """A small search with all that a trial's life has: pauses, resumption, seed replicates, refit, export, test file.

    Args:
        folder: of its files.
        more: further options of the command line.
    """

    def __init__(self, folder: Path, more: list[str]) -> None:
        self.folder, self.more = folder, more
        self._write_files()

    def _write_files(self) -> None:
        from lightning_bge.cli.main import main

        in_child(lambda: main(["sample", str(self.folder / "S")]), self.folder / "sample.log")
        for name, rows in (("train.csv", 32), ("test.csv", 16)):
            lines = (self.folder / "S" / name).read_text(encoding="utf-8").splitlines()[: rows + 1]
            (self.folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def arguments(self, run_dir: Path) -> list[str]:
        """Of the command."""
        options: dict[str, Any] = {
            "model.name_or_path": self.folder / "S" / "model",
            "model.dropout": 0.0,
            "data.train_file": self.folder / "train.csv",
            "data.test_file": self.folder / "test.csv",
            "data.text_columns": "[text, criterion]",
            "data.max_length": 16,
            "data.split.folds": 2,
            "data.cache_dir": self.folder / "cache",
            "trainer.max_epochs": 2,
            "trainer.precision": "32-true",
            "hpo.n_trials": 4,
            "hpo.seed_replicates": 1,
            "hpo.pruner.reduction_factor": 2,
            "hpo.space": "{model.optimizer.lr: {low: 1.0e-4, high: 1.0e-2, log: true}}",
            "run_dir": run_dir,
        }
        return ["hpo", *(part for name, value in options.items() for part in (f"--{name}", str(value))), *self.more]

    def run(self, run_dir: Path, recorder: Recorder | None = None, writes: Path | None = None) -> int:
        """Run the command in a process of its own; returns its exit status."""
        from lightning_bge.cli.main import main

        def call() -> None:
            if recorder is not None:
                sys.addaudithook(recorder)
            main(self.arguments(run_dir))
            if writes is not None and recorder is not None:
                writes.write_text(json.dumps([vars(write) for write in recorder.writes]), encoding="utf-8")

        return in_child(call, run_dir.with_suffix(".log"))


def result_of(run_dir: Path) -> dict[str, Any]:
    """What must be the same however often the search was stopped."""
    from lightning_bge.hpo.analysis.journal import load_study
    from lightning_bge.hpo.trials import attempts, is_to_be_continued

    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    loaded = load_study(run_dir)
    assert loaded is not None
    study, replicates, _ = loaded
    trials = [*study.trials, *replicates]
    best = study.trials[summary["best_trial"]]
    return {
        "best_value": summary["best_value"],
        "best_params": summary["best_params"],
        "fold_scores": best.user_attrs["fold_scores"],
        "test": summary["test"],
        "replicated": sorted(map(str, ([one["mean"], one["values"]] for one in summary["seed_replicates"]["trials"]))),
        "running": [trial.number for trial in trials if trial.state.name == "RUNNING"],
        "not continued": [
            number
            for tries in (attempts(study.trials), attempts(replicates))
            for number, made in tries.items()
            if is_to_be_continued(made)
        ],
        "parameter sets": sorted(str(tries[0].params) for tries in attempts(study.trials).values()),
        "junk": sorted(path.name for path in run_dir.glob("**/*") if path.name.startswith(".model")),
    }


def check(search: Search, expected: dict[str, Any], write: Write, half: bool, place: Path) -> str | None:
    """Stop the search at a write and finish it; returns what is wrong, or None."""
    run_dir = place / f"{write.number}-{HALF[half]}"
    killed = search.run(run_dir, Recorder(run_dir, write.number, half))
    if killed != KILLED:
        return f"the process ended with {killed} before that write"
    status = search.run(run_dir)
    log = run_dir.with_suffix(".log")
    if status:
        return f"the second start ended with {status}: {log.read_text(encoding='utf-8')[-1500:]}"
    found = result_of(run_dir)
    if found != expected:
        return "\n".join(
            f"{name}: {found[name]}, expected {expected[name]}" for name in expected if found[name] != expected[name]
        )
    shutil.rmtree(run_dir)
    log.unlink()
    return None


def main() -> None:
    """Parse the arguments, and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every write, not the first of each kind")
    parser.add_argument("--every", type=int, default=1, help="of these, one in this many")
    parser.add_argument("--processes", type=int, default=2, help="searches at once")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("more", nargs="*", help="further options of the search")
    chosen = parser.parse_args()

    import transformers.models.bert.modeling_bert  # noqa: F401 - what the children need is imported once

    since = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        search = Search(place, chosen.more)
        undisturbed, listed = place / "undisturbed", place / "writes.json"
        status = search.run(undisturbed, Recorder(undisturbed), listed)
        if status:
            sys.exit(f"the undisturbed search failed: {undisturbed.with_suffix('.log').read_text(encoding='utf-8')}")
        expected = result_of(undisturbed)
        writes = [Write(**write) for write in json.loads(listed.read_text(encoding="utf-8"))]
        todo = _choose(writes, chosen.all)[:: chosen.every]
        print(f"{len(writes)} writes of {len({write.kind for write in writes})} kinds; {len(todo)} stops", flush=True)
        with ThreadPoolExecutor(chosen.processes) as pool:
            wrong = list(pool.map(lambda one: check(search, expected, *one, place), todo))
    failures = [(write, HALF[half], text) for (write, half), text in zip(todo, wrong, strict=True) if text is not None]
    for write, how, text in failures:
        print(f"write {write.number}, {how} ({write.kind}): {text}")
    good, seconds = len(todo) - len(failures), time.monotonic() - since
    print(f"{good} of {len(todo)} ended like the undisturbed search, {seconds:.0f} s")
    if chosen.json is not None:
        content = {"writes": len(writes), "kinds": Counter(write.kind for write in writes), "stops": len(todo)}
        content |= {"options": chosen.more, "failed": [[*one] for one in map(str, failures)]}
        chosen.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sys.exit(bool(failures))


def _choose(writes: list[Write], every: bool) -> list[tuple[Write, bool]]:
    """The stops: before each write, and after half of those that can be left half done (before the next one)."""
    first = {write.kind: write for write in reversed(writes)}
    chosen = writes if every else sorted(first.values(), key=lambda write: write.number)
    before = [(write, False) for write in chosen]
    half = [(writes[write.number + 1], True) for write in chosen if write.half and write.number + 1 < len(writes)]
    return [*before, *half]


if __name__ == "__main__":
    main()
