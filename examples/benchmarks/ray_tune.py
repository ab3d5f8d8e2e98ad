"""The same trials by lightning-bge and by Ray Tune on one Ray cluster: seconds, and what a trial costs besides.

    pip install 'lightning-bge[ray]' -r examples/benchmarks/requirements.txt
    python examples/benchmarks/ray_tune.py --data FOLDER                 # FOLDER/sick/train.tsv, dev.tsv

Both have the same list of parameter sets (drawn once from a fixed generator), the same module, data module, trainer,
rows, seeds, epochs and metric, asynchronous successive halving with the same rungs, and as many workers with one CPU
each. They take turns, each search in a fresh process. Give the machine nothing else to do meanwhile.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from common import REPOSITORY, add_shared_arguments, check_shared_arguments, write_record
from hpo_race import draw_trials
from lightning.pytorch import Callback, LightningModule, Trainer
from measures import Run, medians_of, ratio_of, values_of
from note import table, write_note
from searches import NAME, OUR_NAMES, Trial

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.tables.config import TableConfig
from lightning_bge.hpo.storage.journal import JOURNAL, open_storage
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.optimizer import OptimizerConfig, ScheduleConfig
from lightning_bge.trainer import quiet_trainer

OURS, TUNE, REUSE = "lightning-bge", "Ray Tune", "Ray Tune, reuse_actors"
METRIC = "accuracy"
FIELDS = ("wall_seconds", "to_target_seconds", "inside_seconds", "overhead_seconds", "validations", "best_value")
SECONDS_FILE = "LIGHTNING_BGE_BENCHMARK_SECONDS"  # environment variable: where `InsideSeconds` writes

DEFINITIONS = """\
- **wall**: from the start of the command to its end, imports included. The cluster is there before.
- **to the target**: from the start of the command to the first report of the target, the lowest best value that a
  contender has found in this round.
- **inside**: seconds of all workers inside training steps and validation, summed.
- **overhead of a trial**: workers x wall - inside, over the number of trials: starts of processes, building of models,
  data, scheduling, and workers that wait for the last trial.
- **validations**: epochs that were trained, in all trials."""


class InsideSeconds(Callback):
    """Adds a line with the seconds inside training steps and validation to a file, after each validation."""

    def __init__(self) -> None:
        self._seconds = self._since = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self._seconds += time.perf_counter() - self._since

    def on_validation_start(self, *args: Any) -> None:
        self._since = time.perf_counter()

    def on_validation_end(self, *args: Any) -> None:
        self._seconds += time.perf_counter() - self._since
        with Path(os.environ[SECONDS_FILE]).open("a") as file:
            file.write(f"{self._seconds}\n")
        self._seconds = 0.0


class Report(Callback):
    """Tells Ray Tune the metric after each validation."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from ray import tune

        tune.report({METRIC: trainer.callback_metrics[f"val_{METRIC}"].item(), "time": time.time()})


def options(given: argparse.Namespace) -> dict[str, Any]:
    """The options of model, data and trainer, as a YAML file has them."""
    sick = Path(given.data, "sick").resolve()
    return {
        "seed_everything": given.seed,
        "model": {"name_or_path": given.model, "task": "multiclass"},
        "data": {
            "train_file": str(sick / "train.tsv"),
            "val_file": str(sick / "dev.tsv"),
            "text_columns": ["sentence_A", "sentence_B"],
            "label_column": "entailment_judgment",
            "table": {"max_rows": given.rows},
        },
        "monitor": {"metric": METRIC, "objective": "best"},
        "trainer": {"max_epochs": given.epochs, "precision": "32-true", "accelerator": "cpu"},
    }


# ---------------------------------------------------------------------- lightning-bge


def search_ours(given: argparse.Namespace, trials: list[Trial], folder: Path, address: str) -> None:
    """`lightning-bge hpo --launcher ray`, in this process."""
    from lightning_bge.cli.main import main

    enqueued = [{OUR_NAMES[name]: value for name, value in trial.items()} for trial in trials]
    space = {OUR_NAMES[name]: _range(trials, name) for name in trials[0]}
    config = options(given)
    config["trainer"]["callbacks"] = [{"class_path": "ray_tune.InsideSeconds"}]
    config["data"]["cache_dir"] = str(folder / "cache")
    config |= {"run_dir": str(folder / NAME), "launcher": "ray", "ray": {"address": address}}
    config["hpo"] = {"n_trials": len(trials), "space": space, "enqueue": enqueued, "workers": given.workers}
    config["hpo"] |= {"pruner": {"name": "asha", "reduction_factor": given.factor}, "refit": False, "baseline": False}
    (folder / "search.yaml").write_text(yaml.safe_dump(config))
    main(["hpo", "-c", str(folder / "search.yaml")])


def _range(trials: list[Trial], name: str) -> dict[str, float]:
    values = [trial[name] for trial in trials]
    return {"low": min(values), "high": max(values)}


def reports_of_ours(folder: Path) -> list[tuple[float, float]]:
    """Time and value of each trial's last report."""
    import optuna

    study = optuna.load_study(study_name=NAME, storage=open_storage(folder / NAME / JOURNAL))
    ended = [one for one in study.trials if one.datetime_complete is not None and one.intermediate_values]
    return [(one.datetime_complete.timestamp(), max(one.intermediate_values.values())) for one in ended]


# ---------------------------------------------------------------------- Ray Tune


def train_in_tune(params: Trial, config: dict[str, Any], cache: str) -> None:
    """A trial of Ray Tune: what its guide for Lightning shows, with our module and data module."""
    data, seed = config["data"], config["seed_everything"]
    model = BGEClassifier(
        **config["model"],
        optimizer=OptimizerConfig(lr=params["lr"], weight_decay=params["weight_decay"]),
        schedule=ScheduleConfig(warmup=params["warmup"]),
        seed=seed,
    )
    files = {name: data[name] for name in ("train_file", "val_file", "text_columns", "label_column")}
    module = TextDataModule(
        config["model"]["name_or_path"], task="multiclass", **files, table=TableConfig(**data["table"]), cache_dir=cache
    )
    quiet_trainer({**config["trainer"], "callbacks": [InsideSeconds(), Report()]}).fit(model, module)


def search_tune(given: argparse.Namespace, trials: list[Trial], folder: Path, address: str, reuse: bool) -> None:
    """A search of Ray Tune with Optuna and ASHA; time and value of each report go to `reports.json`."""
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    config, cache = options(given), str(folder / "cache")
    space = {name: tune.uniform(*_range(trials, name).values()) for name in trials[0]}
    tuner = tune.Tuner(
        tune.with_resources(lambda params: train_in_tune(params, config, cache), {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="max",
            num_samples=len(trials),
            max_concurrent_trials=given.workers,
            search_alg=OptunaSearch(points_to_evaluate=trials),
            scheduler=ASHAScheduler(max_t=given.epochs, grace_period=1, reduction_factor=given.factor),
            reuse_actors=reuse,
        ),
        run_config=tune.RunConfig(storage_path=str(folder), name=NAME, verbose=0),
    )
    found = tuner.fit()
    assert not found.errors, found.errors
    frames = [one.metrics_dataframe for one in found]
    reports = [pair for frame in frames for pair in zip(frame["time"], frame[METRIC], strict=True)]
    (folder / "reports.json").write_text(json.dumps(reports))


def reports_of_tune(folder: Path) -> list[tuple[float, float]]:
    """Time and value of each report."""
    return [(when, value) for when, value in json.loads((folder / "reports.json").read_text())]


# ---------------------------------------------------------------------- rounds


def measure(name: str, given: argparse.Namespace, address: str, seconds: Path) -> Run:
    """A search in a fresh process."""
    seconds.write_text("")
    with tempfile.TemporaryDirectory() as folder:
        begin = time.time()
        command = [sys.executable, __file__, *sys.argv[1:], "--contender", name, "--folder", folder]
        subprocess.run([*command, "--address", address], check=True, stdout=subprocess.DEVNULL)
        wall = time.time() - begin
        reports = (reports_of_ours if name == OURS else reports_of_tune)(Path(folder))
    lines = [float(line) for line in seconds.read_text().split()]
    return {
        "contender": name,
        "wall_seconds": wall,
        "inside_seconds": sum(lines),
        "overhead_seconds": (given.workers * wall - sum(lines)) / given.trials,
        "validations": len(lines),
        "best_value": max(value for _, value in reports),
        "reports": [(when - begin, value) for when, value in reports],
    }


def add_targets(runs: list[Run]) -> None:
    """Add when each search of a round has first reported the lowest best value of the round."""
    target = min(run["best_value"] for run in runs)
    for run in runs:
        run["target"] = target
        run["to_target_seconds"] = min(when for when, value in run["reports"] if value >= target)


def cluster(workers: int) -> Any:
    """A Ray cluster of one node, with a CPU for each worker."""
    from ray.cluster_utils import Cluster

    return Cluster(initialize_head=True, head_node_args={"num_cpus": workers, "include_dashboard": False})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The same search by lightning-bge and by Ray Tune, on SICK.")
    add_shared_arguments(parser, "docs/benchmarks/ray_tune.json", lr=None)
    parser.add_argument("--trials", type=int, default=24, help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=600, help="training pairs (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--factor", type=int, default=4, help="reduction factor of ASHA (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="searches of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the trials' list and of every trial")
    for name in ("contender", "folder", "address"):  # of a search in a process of its own
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    given = parser.parse_args()
    check_shared_arguments(given)
    return given


def search(given: argparse.Namespace) -> None:
    """The search of one contender, in this process."""
    trials, folder = list(draw_trials(given.trials, given.seed)), Path(given.folder)
    if given.contender == OURS:
        search_ours(given, trials, folder, given.address)
    else:
        search_tune(given, trials, folder, given.address, given.contender == REUSE)


def tables(summary: dict[str, Any]) -> list[str]:
    """Medians, and ratios."""
    header = (
        "median of the rounds",
        "wall s",
        "to the target s",
        "inside s",
        "overhead of a trial s",
        "epochs",
        "best",
    )
    rows = [(name, *(found[field] for field in FIELDS)) for name, found in summary["medians"].items()]
    ratios = [
        (name, what, found["of_medians"], min(found["by_round"]), max(found["by_round"]))
        for name, kinds in summary["ratios"].items()
        for what, found in kinds.items()
    ]
    return [table(header, rows), table(("than", "times less", "of medians", "lowest round", "highest round"), ratios)]


def main() -> None:
    given = parse()
    if given.contender:
        search(given)
        return
    names, runs = (OURS, TUNE, REUSE), list[Run]()
    with tempfile.TemporaryDirectory() as folder:
        seconds = Path(folder, "seconds")
        here = [str(Path(__file__).parent), str(REPOSITORY)]
        os.environ |= {SECONDS_FILE: str(seconds), "PYTHONPATH": os.pathsep.join(here), "RAY_AIR_NEW_OUTPUT": "0"}
        found = cluster(given.workers)
        for number in range(given.rounds):
            made = [measure(name, given, found.address, seconds) for name in names]
            add_targets(made)
            for run in made:
                print(number + 1, {name: run[name] for name in ("contender", *FIELDS)}, flush=True)
            runs += made
        found.shutdown()
    kinds = ("wall_seconds", "to_target_seconds", "overhead_seconds")
    summary = {
        "medians": medians_of(runs, list(names), FIELDS),
        "ratios": {
            name: {kind: ratio_of(values_of(runs, name, kind), values_of(runs, OURS, kind)) for kind in kinds}
            for name in (TUNE, REUSE)
        },
    }
    record = {"data": f"sick/train.tsv, first {given.rows} rows; sick/dev.tsv", **summary, "runs": runs}
    for name in ("contender", "folder", "address"):
        delattr(given, name)
    write_record(given.out, "ray_tune", given, record)
    about = (
        f"{given.trials} parameter sets on the first {given.rows} training pairs of SICK, up to {given.epochs} epochs, "
        f"each validated on all of dev; {given.workers} workers with one CPU each. lightning-bge is `lightning-bge hpo "
        "--launcher ray` with its pruner `asha`; Ray Tune has `OptunaSearch` with the same list in "
        "`points_to_evaluate`, `ASHAScheduler` with the same reduction factor, and a trainable that trains the same "
        "module. `reuse_actors` keeps the processes from one trial to the next; it is off by default."
    )
    print(
        write_note(given.out, "The same search on a Ray cluster, with Ray Tune", [about, *tables(summary), DEFINITIONS])
    )


if __name__ == "__main__":
    main()
