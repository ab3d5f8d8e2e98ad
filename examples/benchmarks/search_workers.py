"""What several workers bring to a search, and what a trial costs besides its training in a long study.

    python examples/benchmarks/search_workers.py --json docs/benchmarks/search_workers.json

gain: two processes that train the model at the same time, and one alone, for some seconds each: optimizer steps per
second of both over those of one. Then a search with two workers, and one with one: trials per second while all of them
are at work. Each process has one thread. The ratio of the two gains says what sharing a study costs.

overhead: seconds of a trial besides its training and validation, from the end of the trial before to its own end, in a
study that has 50 trials already, and in one that has 2,000.

All in turns, several rounds; medians, with the lowest and the highest round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

ROUNDS = 5
SECONDS = 15.0  # of training, for each measurement of `fit`
FOLDS, EPOCHS = 3, 3
SPACE = {"model.optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "model.dropout": {"low": 0.0, "high": 0.3}}

# run with a folder; trains epoch after epoch, and prints steps per second
TRAIN = """
import sys, time
from pathlib import Path
import lightning.pytorch as pl
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.trainer import BGETrainer
folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
data = TextDataModule(str(folder / "model"), train_file=str(folder / "train.csv"), text_columns=["text", "criterion"],
                      group_column="post_id", split={"folds": 3}, cache_dir=str(folder / "cache"))
data.setup("fit")
data.select_fold(0)
class Steps(pl.Callback):
    warm = 0
    def on_train_batch_end(self, trainer, *_):
        self.warm += 1
        if self.warm == 10:
            print("ready", flush=True)
            sys.stdin.readline()
            self.since, self.first = time.perf_counter(), trainer.global_step
        if self.warm > 10 and time.perf_counter() - self.since > seconds:
            print((trainer.global_step - self.first) / (time.perf_counter() - self.since), flush=True)
            trainer.should_stop = True
            raise SystemExit(0)
off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
trainer = BGETrainer(max_epochs=1000, precision="32-true", limit_val_batches=0, callbacks=[Steps()], **off)
trainer.fit(BGEClassifier(str(folder / "model")), datamodule=data)
"""


def run_fits(folder: Path, count: int) -> float:
    """Optimizer steps per second of so many processes together."""
    command = [sys.executable, "-c", TRAIN, str(folder), str(SECONDS)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, stderr=subprocess.DEVNULL, **pipes) for _ in range(count)]
    for process in processes:
        while process.stdout.readline() != "ready\n":  # type: ignore[union-attr]
            assert process.poll() is None
    for process in processes:
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    return math.fsum(float(process.communicate()[0].split()[-1]) for process in processes)


def run_search(folder: Path, run_dir: Path, workers: int, n_trials: int) -> float:
    """Trials per second while all workers are at work."""
    options: dict[str, Any] = {
        "model.name_or_path": folder / "model",
        "data.train_file": folder / "train.csv",
        "data.text_columns": "[text, criterion]",
        "data.group_column": "post_id",
        "data.split.folds": FOLDS,
        "data.cache_dir": folder / "cache",
        "trainer.max_epochs": EPOCHS,
        "trainer.precision": "32-true",
        "hpo.n_trials": n_trials,
        "hpo.pruner.name": "none",
        "hpo.sampler.name": "random",
        "hpo.refit": "false",
        "hpo.baseline": "false",
        "hpo.workers": workers,
        "hpo.space": json.dumps(SPACE),
        "run_dir": run_dir,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "lightning_bge.cli", "hpo", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    from lightning_bge.hpo.analysis.journal import load_study

    loaded = load_study(run_dir)
    assert loaded is not None
    return rate(loaded[0].get_trials(deepcopy=False))


def rate(trials: list[FrozenTrial]) -> float:
    """Trials per second from the end of each worker's first trial to the end of a worker's last one."""
    by_worker: dict[str, list[tuple[float, float]]] = {}
    for trial in trials:
        assert trial.datetime_start is not None
        assert trial.datetime_complete is not None
        span = (trial.datetime_start.timestamp(), trial.datetime_complete.timestamp())
        by_worker.setdefault(trial.user_attrs["worker"]["id"], []).append(span)
    since = max(spans[0][1] for spans in by_worker.values())
    until = min(spans[-1][1] for spans in by_worker.values())
    spans = [span for one in by_worker.values() for span in one]
    shares = [max(0.0, min(end, until) - max(start, since)) / (end - start) for start, end in spans]
    return math.fsum(shares) / (until - since)


# ---------------------------------------------------------------------- overhead


def overhead(folder: Path, run_dir: Path, before: int) -> float:
    """Seconds of a trial besides training and validation, in a study that has so many trials."""
    grown = folder / f"grown-{before}"
    call = "from examples.benchmarks.search_workers import {0}; {0}({1!r}, {2!r}, {3})"
    if not grown.exists():
        code = call.format("grow", str(folder), str(grown), before)
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    shutil.copytree(grown, run_dir)
    code = call.format("measure_overhead", str(folder), str(run_dir), before)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def templates(folder: str) -> dict[str, Any]:
    """Model, data and options of the study."""
    from lightning_bge import BGEClassifier, TextDataModule

    model = str(Path(folder) / "model")
    data = TextDataModule(
        model,
        train_file=str(Path(folder) / "train.csv"),
        text_columns=["text", "criterion"],
        group_column="post_id",
        split={"folds": FOLDS},
        cache_dir=str(Path(folder) / "cache"),
    )
    return {"model": BGEClassifier(model), "data": data, "space": SPACE}


def grow(folder: str, run_dir: str, count: int) -> None:
    """Make a study of so many trials that are not trained; run in a process of its own."""
    import numpy as np

    from lightning_bge.hpo.run import check_study, prepare_study
    from lightning_bge.hpo.scheduling.study_queue import StudyQueue
    from lightning_bge.hpo.scheduling.trial_loop import quiet_optuna, run_trials
    from lightning_bge.hpo.space.search_space import suggest
    from lightning_bge.hpo.study import study_storage
    from lightning_bge.runtime.stop import StopRequest
    from lightning_bge.templates import study_of_templates

    quiet_optuna()
    trainer = {"precision": "32-true", "max_epochs": EPOCHS}
    rest: dict[str, Any] = {"run_dir": Path(run_dir), "n_trials": count, "metric": None, "seed": 42}
    experiment, hpo = study_of_templates(**templates(folder), trainer=trainer, options={}, **rest)
    Path(run_dir).mkdir()
    space, steps = check_study(experiment, hpo)
    place = study_storage(Path(run_dir), hpo)
    study, random = prepare_study(experiment, hpo, space, steps, place), np.random.default_rng(0)

    def objective(trial: optuna.Trial) -> float:
        params = suggest(trial, space)
        value = 0.8 - 0.1 * abs(math.log10(params["model.optimizer.lr"]) + 3) - params["model.dropout"] / 10
        value += random.normal(0, 0.02)
        done = len(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        for step in range(done + 1, steps.total + 1):
            trial.report(value - 0.3 / step, step)
            if step < steps.total and trial.should_prune():
                trial.set_user_attr("paused_at", step)
                raise optuna.TrialPruned
        trial.set_user_attr("fold_scores", [value] * FOLDS)
        trial.set_user_attr("fold_epochs", [1] * FOLDS)
        return value

    with place.worker() as worker:
        queue = StudyQueue(study, place, worker, hpo, space)
        run_trials(queue, objective, until=math.inf, request=StopRequest(), report=lambda *_: None)


def measure_overhead(folder: str, run_dir: str, before: int) -> None:
    """Print the median seconds of a trial besides its training; run in a process of its own."""
    from lightning_bge import tune

    options: dict[str, Any] = {
        "refit": False,
        "baseline": False,
        "seed_replicates": 0,
        "trainer": {"precision": "32-true"},
    }
    result = tune(**templates(folder), run_dir=run_dir, n_trials=before + 12, max_epochs=EPOCHS, **options)
    trials = result.study.get_trials(deepcopy=False)
    last = trials[-1].user_attrs["worker"]["id"]
    ours = [trial for trial in trials if trial.user_attrs["worker"]["id"] == last]
    spent = []
    for earlier, trial in list(pairwise(ours))[2:]:  # the first ones pay for what a process does once
        assert trial.datetime_complete is not None
        assert earlier.datetime_complete is not None
        reports = [report for fold in trial.user_attrs["curve"] for report in fold]
        own = [one for one in reports if one[0] > trial.user_attrs.get("reports_before", 0)]
        trained = math.fsum(one[2] + one[3] for one in own)
        spent.append((trial.datetime_complete - earlier.datetime_complete).total_seconds() - trained)
    print(statistics.median(spent))


# ---------------------------------------------------------------------- rounds


def in_turns(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call each once in each round."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            found[name].append(call())
            print(f"round {number + 1}: {name} {found[name][-1]:.4g}", flush=True)
    return found


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--trials", type=int, default=40, help="of each search with two workers; half with one")
    parser.add_argument("--parts", nargs="*", default=["gain", "overhead"])
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    result: dict[str, Any] = {"rounds": chosen.rounds}
    with tempfile.TemporaryDirectory() as name:
        folder, count = Path(name), iter(range(10**6))
        command = [sys.executable, "-m", "lightning_bge.cli", "sample", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        since = time.monotonic()
        if "gain" in chosen.parts:
            calls: dict[str, Callable[[], float]] = {
                "fit, two processes": lambda: run_fits(folder, 2),
                "search, two workers": lambda: run_search(folder, folder / f"run{next(count)}", 2, chosen.trials),
                "fit, one process": lambda: run_fits(folder, 1),
                "search, one worker": lambda: run_search(folder, folder / f"run{next(count)}", 1, chosen.trials // 2),
            }
            found = in_turns(calls, chosen.rounds)
            gains = {
                what: [two / one for two, one in zip(found[many], found[few], strict=True)]
                for what, many, few in (
                    ("fit", "fit, two processes", "fit, one process"),
                    ("search", "search, two workers", "search, one worker"),
                )
            }
            fit, search = (statistics.median(gains[what]) for what in ("fit", "search"))
            result["gain"] = {"rates": found, "gains": gains, "ratio of medians": search / fit}
            print(f"gain of two: fit {fit:.3f}, search {search:.3f}, ratio {search / fit:.3f}")
        if "overhead" in chosen.parts:
            sizes = {f"{size} trials": size for size in (50, 2000)}
            found = in_turns(
                {
                    text: lambda size=size: overhead(folder, folder / f"run{next(count)}", size)  # type: ignore[misc]
                    for text, size in sizes.items()
                },
                chosen.rounds,
            )
            few, many = (statistics.median(found[text]) for text in sizes)
            result["overhead"] = {"seconds": found, "ratio of medians": many / few}
            print(f"overhead of a trial: {few:.3f} s with 50 trials, {many:.3f} s with 2,000, ratio {many / few:.3f}")
        result["seconds"] = round(time.monotonic() - since)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
