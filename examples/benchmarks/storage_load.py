"""What a study costs in a database: coordination of a few workers, and the load of hundreds.

    python examples/benchmarks/storage_load.py cost
    python examples/benchmarks/storage_load.py load

cost: four processes share a study of trials with 15 reports, whose training is a pause. Seconds of a trial besides the
pauses, from the end of the trial before to its own end: with a journal file, in PostgreSQL, and through the gRPC proxy;
beside them one process with a journal file, which has nobody to wait for. In turns, several rounds, medians.

load: 256 workers, each a thread with storage and connections of its own, share a study of 2,000 trials, directly and
through the proxy. Seconds of a trial besides the pauses, connections, transactions and the server's CPU time. The
threads are those of several processes: hundreds in one would wait for Python's lock, and not for the storage.

It needs the extras `postgres` and `grpc`, and Debian's package postgresql.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
from common import git_commit, hardware, markdown_table, versions

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from lightning_bge.hpo.config import StudyConfig  # noqa: E402
from lightning_bge.hpo.pruning.config import PrunerConfig  # noqa: E402
from lightning_bge.hpo.scheduling.study_queue import StudyQueue  # noqa: E402
from lightning_bge.hpo.scheduling.trial_loop import quiet_optuna, run_trials  # noqa: E402
from lightning_bge.hpo.space.search_space import parse_space, suggest  # noqa: E402
from lightning_bge.hpo.steps import Steps  # noqa: E402
from lightning_bge.hpo.storage.url import PASSWORD  # noqa: E402
from lightning_bge.hpo.study import open_study, study_storage  # noqa: E402
from lightning_bge.hpo.trials import REPORTS_BEFORE  # noqa: E402
from lightning_bge.runtime.port import free_port  # noqa: E402
from lightning_bge.runtime.run_folder import write_json, write_text  # noqa: E402
from lightning_bge.runtime.stop import StopRequest  # noqa: E402
from tests.helpers.postgres import SECRET, Postgres  # noqa: E402

DOCS = ROOT / "docs" / "benchmarks"
SPACE = {"x": {"low": 0.0, "high": 1.0}, "y": {"low": 0.0, "high": 1.0}}
COST_REPORTS = 15
ALONE = "journal, one process"
KINDS = ("journal", "PostgreSQL", "PostgreSQL behind the proxy")


def run_worker(run_dir: Path, options: dict[str, Any], pause: float, reports: int) -> None:
    """Run what is left of a study whose training is a pause before each report."""
    config = StudyConfig(space=SPACE, pruner=PrunerConfig("median"), **options)
    space, place, steps = parse_space(SPACE), study_storage(run_dir, config), Steps(1, reports)

    def objective(trial: optuna.Trial) -> float:
        params = suggest(trial, space)
        value = -((params["x"] - 0.7) ** 2) - (params["y"] - 0.3) ** 2
        for step in range(1, reports + 1):
            time.sleep(pause)
            trial.report(value - 1 / step, step)
            if step < reports:
                trial.should_prune()  # reads all trials; its answer is not followed, so that each has all reports
        return value

    with place.worker() as worker:
        with place.lock(worker):
            study = open_study(place, config, "maximize", steps, {"monitor.metric": "f1"})
        queue = StudyQueue(study, place, worker, config, space)
        run_trials(queue, objective, until=math.inf, request=StopRequest(), report=lambda *_: None)


def start_workers(
    run_dir: Path, options: dict[str, Any], pause: float, reports: int, threads: int
) -> subprocess.Popen[bytes]:
    """A process whose threads are so many workers."""
    values = (json.dumps(options), str(pause), str(reports), str(threads))
    return subprocess.Popen([sys.executable, __file__, "--workers-of", str(run_dir), *values])


def run_workers(run_dir: Path, options: dict[str, Any], pause: float, reports: int, threads: int) -> None:
    """Run workers until the study is over."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(threads) as pool:
        for one in [pool.submit(run_worker, run_dir, options, pause, reports) for _ in range(threads)]:
            one.result()


def besides_pauses(trials: list[optuna.trial.FrozenTrial], pause: float) -> list[float]:
    """Seconds of each trial besides its pauses, from the end of its worker's trial before."""
    by_worker: dict[str, list[optuna.trial.FrozenTrial]] = {}
    for trial in trials:
        by_worker.setdefault(trial.user_attrs["worker"]["id"], []).append(trial)
    found = []
    for mine in by_worker.values():
        for before, after in pairwise(mine):
            assert before.datetime_complete is not None
            assert after.datetime_complete is not None
            reports = len(after.intermediate_values) - after.user_attrs.get(REPORTS_BEFORE, 0)
            found.append((after.datetime_complete - before.datetime_complete).total_seconds() - reports * pause)
    return found


@contextmanager
def proxy(server: Postgres, threads: int = 32) -> Iterator[str]:
    """Serve a database; the URL of the proxy."""
    port = free_port()
    command = [sys.executable, "-m", "lightning_bge.cli", "proxy", server.url, "--port", str(port)]
    process = subprocess.Popen([*command, "--threads", str(threads)], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        yield f"grpc://localhost:{port}"
    finally:
        process.terminate()
        process.wait()


def trials_of(run_dir: Path, options: dict[str, Any]) -> list[optuna.trial.FrozenTrial]:
    """The trials of a study."""
    place = study_storage(run_dir, StudyConfig(space=SPACE, **options))
    name = options.get("study_name") or run_dir.name
    return optuna.load_study(study_name=name, storage=place.storage).get_trials(deepcopy=False)


def measure_cost(
    place: Path, storages: dict[str, str | None], number: int, chosen: argparse.Namespace
) -> dict[str, float]:
    """Median seconds of a trial besides its pauses with four processes, of each storage in turn."""
    found, pause = {}, chosen.cost_pause
    for place_number, (kind, url) in enumerate({ALONE: None, **storages}.items()):
        run_dir, workers = place / f"cost-{number}-{place_number}", 1 if kind == ALONE else 4
        options = {"n_trials": chosen.cost_trials * workers // 4, "storage": url, "study_name": run_dir.name}
        running = [start_workers(run_dir, options, pause, COST_REPORTS, 1) for _ in range(workers)]
        if any(process.wait() for process in running):
            raise RuntimeError(f"a worker with {kind} failed")
        found[kind] = statistics.median(besides_pauses(trials_of(run_dir, options), pause))
        print(f"cost, round {number + 1}: {kind} {found[kind]:.3f} s", flush=True)
    return found


def measure_load(place: Path, server: Postgres, url: str, name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Run a study with many threads; figures of its trials and of the server."""
    options, pause = {"n_trials": chosen.load_trials, "storage": url, "study_name": name}, chosen.load_pause
    folders = [place / name / str(number) for number in range(chosen.processes)]
    transactions, cpu, since, most = _transactions(server), _cpu_seconds(server), time.monotonic(), 0
    threads = chosen.workers // chosen.processes
    running = [start_workers(folder, options, pause, chosen.load_reports, threads) for folder in folders]
    while any(process.poll() is None for process in running):
        most = max(most, int(server.query("select count(*) from pg_stat_activity where datname = 'studies'")) - 1)
        time.sleep(5.0)
    if any(process.returncode for process in running):
        raise RuntimeError(f"workers of {name} failed")
    seconds = time.monotonic() - since
    ended = trials_of(place, options)
    spent = sorted(besides_pauses(ended, pause))
    return {
        "seconds": seconds,
        "trials": len(ended),
        "parameter_sets": len({tuple(trial.params.values()) for trial in ended}),
        "overhead median": statistics.median(spent),
        "overhead 90 %": spent[int(0.9 * len(spent))],
        "connections": most,
        "transactions per trial": (_transactions(server) - transactions) / len(ended),
        "server CPU seconds per trial": (_cpu_seconds(server) - cpu) / len(ended),
    }


def _transactions(server: Postgres) -> int:
    time.sleep(1.5)  # sessions report their counts once a second
    return int(server.query("select xact_commit + xact_rollback from pg_stat_database where datname = 'studies'"))


def _cpu_seconds(server: Postgres) -> float:
    """CPU time of the server and of the sessions that have ended or are open."""
    head = int((server.folder / "data" / "postmaster.pid").read_text().splitlines()[0])
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(head)], capture_output=True, text=True).stdout.split()
    total = 0.0
    for pid in (head, *map(int, listed)):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        # user and system time, and for the head those of its ended children
        total += sum(map(int, fields[11:15] if pid == head else fields[11:13]))
    return total / os.sysconf("SC_CLK_TCK")


COLUMNS = {
    "overhead median": "besides the pauses, s",
    "overhead 90 %": "90 % below, s",
    "connections": "connections",
    "transactions per trial": "transactions a trial",
    "server CPU seconds per trial": "server's CPU s a trial",
}


def note(part: str, result: dict[str, Any]) -> str:
    """The note beside the JSON."""
    machine = result["hardware"]
    units = ", ".join(machine["cpu_units"])
    return f"""# Studies in a database: {"coordination of a few workers" if part == "cost" else "hundreds of workers"}

{machine["cores"]} cores of an {machine["cpu"]} ({units}), Optuna {result["versions"]["optuna"]}. PostgreSQL, proxy
and workers are on this one machine. `storage_load.py {part}`, [JSON](storage_{part}.json).

{(cost_text if part == "cost" else load_text)(result[part], result["options"])}
"""


def cost_text(found: dict[str, Any], options: dict[str, Any]) -> str:
    rows = [[kind, *(of(values) for of in (statistics.median, min, max))] for kind, values in found.items()]
    return f"""\
Four processes, {options["cost_trials"]} trials with 15 reports, {options["cost_pause"]} s of pause before each
report in place of training. Seconds of a trial besides its pauses, from the end of the trial before to its own end: the
next trial under the lock, its parameters (TPE), 15 reports to the median pruner, and its end. Medians of the trials,
then of {options["rounds"]} rounds in turns. What one process with a journal file needs is Optuna's own work and the
machine's: after a pause code and data have to be fetched into the caches again.

{markdown_table(["storage", "median, s", "lowest", "highest"], rows)}"""


def load_text(found: dict[str, Any], options: dict[str, Any]) -> str:
    rows = [
        [kind, round(one["seconds"]), one["trials"], *(one[name] for name in COLUMNS)] for kind, one in found.items()
    ]
    return f"""\
{options["workers"]} threads of {options["processes"]} processes, each a worker with storage and connections of its own.
{options["load_trials"]} trials with {options["load_reports"]} reports, {options["load_pause"]} s of pause before each.
All of them share the cores with the server and the proxy: the seconds are an upper limit.

{markdown_table(["storage", "seconds", "trials", *COLUMNS.values()], rows)}"""


def main() -> None:
    """Measure, print, and write."""
    if sys.argv[1:2] == ["--workers-of"]:
        quiet_optuna()
        run_workers(Path(sys.argv[2]), json.loads(sys.argv[3]), float(sys.argv[4]), *map(int, sys.argv[5:]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("cost", "load"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cost_trials", type=int, default=60)
    parser.add_argument("--cost_pause", type=float, default=0.2)
    parser.add_argument("--workers", type=int, default=256)
    parser.add_argument("--processes", type=int, default=16, help="whose threads the workers of the load are")
    parser.add_argument("--load_trials", type=int, default=2000)
    parser.add_argument("--load_reports", type=int, default=5)
    parser.add_argument("--load_pause", type=float, default=12.0)
    parser.add_argument("--out", type=Path, help="(default: docs/benchmarks/storage_cost.json or storage_load.json)")
    chosen = parser.parse_args()
    out = chosen.out or DOCS / f"storage_{chosen.part}.json"
    os.environ |= {"OMP_NUM_THREADS": "1", PASSWORD: SECRET}
    quiet_optuna()
    result: dict[str, Any] = {"hardware": hardware(), "versions": versions(), "commit": git_commit()}
    result["options"] = {name: value for name, value in vars(chosen).items() if name not in ("out", "part")}
    with (
        Postgres(connections=3 * chosen.workers + 50) as server,
        tempfile.TemporaryDirectory() as name,
        proxy(server) as url,
    ):
        place, storages = Path(name), dict(zip(KINDS, (None, server.url, url), strict=True))
        if chosen.part == "cost":
            rounds = [measure_cost(place, storages, number, chosen) for number in range(chosen.rounds)]
            result["cost"] = {kind: [found[kind] for found in rounds] for kind in (ALONE, *KINDS)}
        else:
            result["load"] = {}
            for kind in KINDS[1:]:
                study = f"load-{KINDS.index(kind)}"
                result["load"][kind] = measure_load(place, server, str(storages[kind]), study, chosen)
                print(kind, json.dumps(result["load"][kind]), flush=True)
    write_json(out, result)
    write_text(out.with_suffix(".md"), note(chosen.part, result))


if __name__ == "__main__":
    main()
