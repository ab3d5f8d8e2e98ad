"""Kills the workers of searches at random moments, and checks what is left of each search.

    python tests/tools/chaos.py --runs 10 --json F      # 4 workers, 60 trials, 20 kills a search: most of an hour
    python tests/tools/chaos.py --runs 1 --trials 12 --kills 5 --aimed 1
    python tests/tools/chaos.py --postgres --away 60     # as the first, in a PostgreSQL that is restarted and goes away

Each search is `lightning-bge hpo --hpo.workers 4`; with --postgres every second one is as on four machines: four
`lightning-bge hpo` with run folders of their own, which see no lock of each other, go by signs of life, share
checkpoints through hpo.files, and are started again when they are killed. The workers get SIGKILL, at a mean interval
of three durations of a trial; some of the kills are aimed at a worker that is starting, and some at the end, when seed
replicates, refit and export run. Trials are added until enough kills have fallen. Then the search has to end by itself,
with every parameter set complete, pruned or paused, none twice, none running, no finished fold trained a second time,
and one summary.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.analysis.journal import has_study, present_study
from lightning_bge.hpo.config import SEED_REPLICATES
from lightning_bge.hpo.storage.study_storage import open_study_storage
from lightning_bge.hpo.storage.url import PASSWORD
from lightning_bge.hpo.trials import (
    N_TRIALS,
    REPORTS_BEFORE,
    attempts,
    ended_parameter_sets,
    has_failed,
    is_to_be_continued,
    key_of,
)
from tests.helpers.postgres import SECRET, Postgres

PAIRS = [("asha", "tpe"), ("median", "random"), ("asha", "random"), ("median", "tpe")]
FILES = "files"  # of processes apart, what they share
POLL_SECONDS = 0.05
LIMIT_SECONDS = 1800  # of a search; it never takes half of that


@dataclass
class Search:
    """One search that is being disturbed.

    Args:
        run_dir: its folder.
        arguments: of `lightning-bge hpo`.
        kills: how many in all.
        aimed: how many of them at a start, and at the end.
        seed: of the moments.
        database: in which the study is kept; None: in its journal.
        away: seconds for which the database is gone once, besides one restart.
        apart: how many processes with run folders of their own share the study; 0: workers of one process.
    """

    run_dir: Path
    arguments: list[str]
    kills: int
    aimed: int
    seed: int
    database: Postgres | None = None
    away: float = 0.0
    apart: int = 0
    random: random.Random = field(init=False)
    done: dict[str, int] = field(default_factory=lambda: {"start": 0, "random": 0, "end": 0})
    summaries: set[int] = field(default_factory=set)

    def run(self) -> dict[str, Any]:
        """Run and disturb it, and check what is left; returns figures, and `faults`."""
        self.random, since = random.Random(self.seed), time.monotonic()
        command = [sys.executable, "-m", "lightning_bge.cli", "hpo", *self.arguments]
        if self.database is not None:
            command += ["--hpo.storage", self.database.url, "--hpo.study_name", self.run_dir.name]
            self.done |= {"restart": 0, "away": 0}
        with self.run_dir.with_suffix(".log").open("wb") as log:
            if self.apart:
                process: Processes = Apart(command, self.run_dir, self.apart)
            else:
                process = Together(subprocess.Popen([*command, "--run_dir", str(self.run_dir)], stdout=log, stderr=log))
            try:
                self._disturb(process, since)
                status = process.wait(LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                process.kill()
        faults = [] if status == 0 else [f"exit status {status}"]
        if status == 0:
            faults += self._faults()
        found = {"seconds": round(time.monotonic() - since), "kills": self.done, "faults": faults}
        return found | self._counts()

    # ------------------------------------------------------------------ killing

    def _disturb(self, process: Processes, since: float) -> None:
        known: dict[int, float] = {}  # the workers, and when they were first seen
        next_kill, n_end = time.monotonic() + 15.0, self.aimed
        while process.poll() is None and time.monotonic() - since < LIMIT_SECONDS:
            time.sleep(POLL_SECONDS)
            self._look_at_summary()
            now, workers = time.monotonic(), process.workers()
            fresh = [pid for pid in workers if pid not in known]
            known |= dict.fromkeys(fresh, now)
            study = self._study()
            if study is None:
                continue
            self._disturb_database(study, workers)
            at_end = self._is_over(study)
            n_before = self.done["start"] + self.done["random"]
            if n_before < self.kills - n_end and self._left(study) < 2 * len(workers):
                study.set_user_attr(N_TRIALS, study.user_attrs[N_TRIALS] + 10)
            elif at_end and self.done["end"] < n_end:
                if now >= next_kill and self._kill(self._at_work(workers, known, now), "end"):
                    next_kill = now + self.random.uniform(0.3, 2.0)
            elif n_before < self.kills - n_end and now >= next_kill:
                starting = [pid for pid in workers if now - known[pid] < 4.0]
                if starting and self.done["start"] < self.aimed:
                    self._kill(starting, "start")
                else:
                    self._kill(workers, "random")
                next_kill = now + self.random.expovariate(1 / (3 * self._trial_seconds(study)))

    def _disturb_database(self, study: optuna.Study, workers: list[int]) -> None:
        """Restart the database after a third of the kills; after two thirds it is away, while one more is killed."""
        done = self.done["start"] + self.done["random"]
        if self.database is None or self.done["away"]:
            return
        if not self.done["restart"] and done >= self.kills // 3:
            self.database.stop()
            self.database.start()
            self.done["restart"] = 1
        elif done >= 2 * self.kills // 3:
            self.database.stop("immediate")
            time.sleep(self.away / 2)
            self._kill(workers, "random")
            time.sleep(self.away / 2)
            self.database.start()
            self.done["away"] = 1

    def _kill(self, pids: list[int], kind: str) -> bool:
        if not pids:
            return False
        try:
            os.kill(self.random.choice(pids), signal.SIGKILL)
        except ProcessLookupError:
            return False
        self.done[kind] += 1
        return True

    def _at_work(self, workers: list[int], known: dict[int, float], now: float) -> list[int]:
        """Those that have had the time to open the study."""
        names = [path.stem.split("-")[-2] for path in self.run_dir.glob("**/workers/*.lock")]
        return [pid for pid in workers if str(pid) in names and now - known[pid] > 1.0]

    def _study(self) -> optuna.Study | None:
        if not any(self.run_dir.glob("**/config.yaml")):
            return None
        if not hasattr(self, "_opened"):
            url = None if self.database is None else self.database.url
            place = open_study_storage(self.run_dir, url, self.run_dir.name)
            storage, name = place.storage, present_study(place.storage, place.name)
            if name is None:
                return None
            self._opened = optuna.load_study(study_name=name, storage=storage)
            self._storage = storage
        return self._opened if N_TRIALS in self._opened.user_attrs else None

    def _is_over(self, study: optuna.Study) -> bool:
        trials = study.get_trials(deepcopy=False)
        made = attempts(trials).values()
        busy = any(tries[-1].state == TrialState.RUNNING or is_to_be_continued(tries) for tries in made)
        return not busy and ended_parameter_sets(trials) >= study.user_attrs[N_TRIALS]

    def _left(self, study: optuna.Study) -> int:
        return int(study.user_attrs[N_TRIALS] - ended_parameter_sets(study.get_trials(deepcopy=False)))

    def _trial_seconds(self, study: optuna.Study) -> float:
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        seconds = [trial.duration.total_seconds() for trial in ended if trial.duration]
        return statistics.median(seconds) if len(seconds) > 3 else 2.0

    def _look_at_summary(self) -> None:
        path = self.run_dir / (FILES if self.apart else "") / "summary.json"
        with suppress(FileNotFoundError):
            self.summaries.add(path.stat().st_ino)

    # ------------------------------------------------------------------ checking

    def _replicates(self) -> list[FrozenTrial]:
        name = f"{self._opened.study_name}{SEED_REPLICATES}"
        return (
            optuna.load_study(study_name=name, storage=self._storage).trials if has_study(self._storage, name) else []
        )

    def _counts(self) -> dict[str, Any]:
        study = self._study()
        if study is None:
            return {}
        trials = study.get_trials(deepcopy=False)
        return {
            "n_trials": study.user_attrs[N_TRIALS],
            "parameter_sets": len(attempts(trials)),
            "trials": len(trials),
            "states": {state.name: sum(trial.state == state for trial in trials) for state in TrialState},
            "seed_replicates": len(self._replicates()),
        }

    def _faults(self) -> list[str]:
        study = self._study()
        assert study is not None
        per_fold = study.user_attrs["steps"]["epochs"] * study.user_attrs["steps"]["per_epoch"]
        trials, faults = study.get_trials(deepcopy=False), []
        made = attempts(trials)
        if len(made) != study.user_attrs[N_TRIALS] or ended_parameter_sets(trials) != len(made):
            faults.append(f"{len(made)} parameter sets, {ended_parameter_sets(trials)} ended")
        if len({key_of(tries[0].params) for tries in made.values()}) != len(made):
            faults.append("a parameter set was begun twice")
        for name, tries in [*made.items(), *attempts(self._replicates()).items()]:
            faults += [f"{name}: {text}" for text in faults_of(tries, per_fold)]
        if len(self.summaries) != 1:
            faults.append(f"summary.json was written {len(self.summaries)} times")
        if sum(self.done.values()) < self.kills or min(self.done["start"], self.done["end"]) < self.aimed:
            faults.append(f"too few kills: {self.done}")
        return faults


def faults_of(tries: list[FrozenTrial], per_fold: int) -> list[str]:
    """What is wrong with the attempts at one parameter set."""
    faults = []
    if has_failed(tries):
        faults.append("failed")
    if is_to_be_continued(tries) or tries[-1].state not in (TrialState.COMPLETE, TrialState.PRUNED):
        faults.append(f"ended as {tries[-1].state.name}, not continued")
    if sum(trial.state == TrialState.COMPLETE for trial in tries) > 1:
        faults.append("complete twice")
    for before, after in pairwise(tries):
        # a fold whose last report was made, but whose process died before it was saved, is not finished
        reported, kept = before.last_step or 0, after.user_attrs.get(REPORTS_BEFORE, 0)
        finished = max(0, reported - 1) // per_fold * per_fold
        if kept < finished:
            faults.append(f"trial {after.number} trained again what trial {before.number} had finished")
    return faults


class Processes(Protocol):
    """The processes of a search."""

    def poll(self) -> int | None:
        """The exit status; None: some run."""

    def wait(self, seconds: float) -> int:
        """Wait for the end; returns the exit status."""

    def workers(self) -> list[int]:
        """The ids of the processes that may be killed."""

    def kill(self) -> None:
        """End all."""


class Together:
    """One process that has started the others."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.poll, self.wait, self.kill = process.poll, process.wait, process.kill
        self._pid = process.pid

    def workers(self) -> list[int]:
        return children(self._pid)


class Apart:
    """Processes as on several machines, each with a run folder of its own.

    One that is killed is started again, as a cluster does; also one that has found no database when it started.
    """

    def __init__(self, command: list[str], folder: Path, number: int) -> None:
        self._command = [*command, "--hpo.files", str(folder / FILES)]
        self._running: dict[Path, subprocess.Popen[bytes]] = {}
        self._folders = [folder / f"machine-{one}" for one in range(number)]
        for one in self._folders:
            self._start(one)

    def _start(self, folder: Path) -> None:
        command = [*self._command, "--run_dir", str(folder), "--hpo.workers", "1"]
        folder.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".log").open("ab") as log:
            self._running[folder] = subprocess.Popen(command, stdout=log, stderr=log)

    def poll(self) -> int | None:
        for folder, process in self._running.items():
            status = process.poll()
            last = folder.with_suffix(".log").read_text(encoding="utf-8").strip().splitlines()[-1:] if status else []
            if status == -signal.SIGKILL or any("does not answer" in line for line in last):
                self._start(folder)
        found = [process.poll() for process in self._running.values()]
        return None if None in found else max(found, key=abs)

    def wait(self, seconds: float) -> int:
        until = time.monotonic() + seconds
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(self._command, seconds)
            time.sleep(POLL_SECONDS)
        return status

    def workers(self) -> list[int]:
        return [process.pid for process in self._running.values() if process.poll() is None]

    def kill(self) -> None:
        for process in self._running.values():
            process.kill()
            process.wait()


def children(pid: int) -> list[int]:
    """The processes that a process has started, without those that have ended."""
    found = subprocess.run(["ps", "-o", "pid=,stat=,args=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()]
    return [int(row[0]) for row in rows if len(row) == 3 and not row[1].startswith("Z") and " worker " in row[2]]


def main() -> None:
    """Parse the arguments, and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--trials", type=int, default=60, help="of each search, at first")
    parser.add_argument("--kills", type=int, default=20, help="in each search")
    parser.add_argument("--aimed", type=int, default=3, help="of them at a start, and as many at the end")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--postgres", action="store_true", help="keep the studies in a PostgreSQL that is disturbed")
    parser.add_argument("--away", type=float, default=60.0, help="seconds for which it is away once in each search")
    chosen = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        place, database = Path(name), None
        if chosen.postgres:
            database = stack.enter_context(Postgres())
            os.environ[PASSWORD] = SECRET
        program = [sys.executable, "-m", "lightning_bge.cli"]
        subprocess.run([*program, "sample", str(place / "S")], check=True, stdout=subprocess.DEVNULL)
        for number in range(chosen.runs):
            pruner, sampler = PAIRS[(number // 2 if chosen.postgres else number) % len(PAIRS)]
            arguments = [
                *("-c", "configs/quickstart.yaml", "--model.name_or_path", str(place / "S/model")),
                *("--data.train_file", str(place / "S/train.csv"), "--data.test_file", str(place / "S/test.csv")),
                *("--data.cache_dir", str(place / "cache"), "--hpo.n_trials", str(chosen.trials)),
                *("--hpo.pruner.name", pruner, "--hpo.sampler.name", sampler, "--hpo.sampler.seed", str(number)),
                *("--hpo.seed_replicates", "1", "--hpo.max_worker_deaths", "1000"),
                *("--hpo.workers", str(chosen.workers), "--hpo.worker_timeout", "12"),
            ]
            apart = chosen.workers if chosen.postgres and number % 2 == 1 else 0
            run_dir = place / f"run-{number}"
            one = {"pruner": pruner, "sampler": sampler, "apart": bool(apart)}
            search = Search(run_dir, arguments, chosen.kills, chosen.aimed, number, database, chosen.away, apart)
            one |= search.run()
            print(json.dumps(one), flush=True)
            if one["faults"]:
                for log in (run_dir.with_suffix(".log"), *run_dir.glob("*.log")):
                    print(log, log.read_text(encoding="utf-8")[-3000:], flush=True)
            found.append(one)
            if chosen.json is not None:
                chosen.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    sys.exit(any(one["faults"] for one in found))


if __name__ == "__main__":
    main()
