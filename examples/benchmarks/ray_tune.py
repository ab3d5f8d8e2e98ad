"""The same trials by lightning-bge and by Ray Tune on one Ray cluster: seconds, and what a trial costs besides.

    pip install 'lightning-bge[ray]' -r examples/benchmarks/requirements.txt
    python examples/benchmarks/ray_tune.py --data FOLDER                 # FOLDER/sick/train.tsv

Both have the same list of parameter sets (drawn once from a fixed generator), the same module, data module, trainer,
rows, seeds, epochs and metric, asynchronous successive halving with the same rungs, and as many workers with one CPU
each. They take turns, each search in a fresh process. Give the machine nothing else to do meanwhile.
"""

from __future__ import annotations

import argparse
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
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.optimizer import OptimizerConfig, ScheduleConfig
from lightning_bge.trainer import quiet_trainer

OURS, TUNE, REUSE = "lightning-bge", "Ray Tune", "Ray Tune, reuse_actors"
METRIC = "loss"  # without ties, with which Ray Tune stops no trial
FIELDS = ("wall_seconds", "to_target_seconds", "inside_seconds", "overhead_seconds", "validations", "best_value")
VALIDATIONS = "LIGHTNING_BGE_BENCHMARK_VALIDATIONS"  # environment variable: the file that `Validations` writes

DEFINITIONS = """\
- **wall**: from the start of the command to its end, imports included. The cluster is there before.
- **to the target**: from the start of the command to the first report of the target, the highest of
  the contenders' best losses in this round.
- **inside**: seconds of all workers inside training steps and validation, summed.
- **overhead of a trial**: workers x wall - inside, over the number of trials: starts of processes, building of models,
  data, scheduling, and workers that wait for the last trial.
- **validations**: epochs that were trained, in all trials."""


class Validations(Callback):
    """Adds a line to a file after each validation: seconds inside training steps and validation, time, and metric."""

    def __init__(self) -> None:
        self._seconds = self._since = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self._seconds += time.perf_counter() - self._since

    def on_validation_start(self, *args: Any) -> None:
        self._since = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seconds += time.perf_counter() - self._since
        with Path(os.environ[VALIDATIONS]).open("a") as file:
            file.write(f"{self._seconds} {time.time()} {trainer.callback_metrics[f'val_{METRIC}'].item()}\n")
        self._seconds = 0.0


class Report(Callback):
    """Tells Ray Tune the metric after each validation."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from ray import tune

        tune.report({METRIC: trainer.callback_metrics[f"val_{METRIC}"].item()})


def options(given: argparse.Namespace) -> dict[str, Any]:
    """The options of model, data and trainer, as a YAML file has them."""
    sick = Path(given.data, "sick").resolve()
    return {
        "seed_everything": given.seed,
        "model": {"name_or_path": given.model, "task": "multiclass"},
        "data": {
            "train_file": str(sick / "train.tsv"),
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
    config["trainer"]["callbacks"] = [{"class_path": "ray_tune.Validations"}]
    config["data"]["cache_dir"] = str(folder / "cache")
    config |= {"run_dir": str(folder / NAME), "launcher": "ray", "ray": {"address": address}}
    config["hpo"] = {"n_trials": len(trials), "space": space, "enqueue": enqueued, "workers": given.workers}
    config["hpo"] |= {"pruner": {"name": "asha", "reduction_factor": given.factor}, "refit": False, "baseline": False}
    (folder / "search.yaml").write_text(yaml.safe_dump(config))
    main(["hpo", "-c", str(folder / "search.yaml")])


def _range(trials: list[Trial], name: str) -> dict[str, float]:
    values = [trial[name] for trial in trials]
    return {"low": min(values), "high": max(values)}


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
    files = {name: data[name] for name in ("train_file", "text_columns", "label_column")}
    module = TextDataModule(
        config["model"]["name_or_path"], task="multiclass", **files, table=TableConfig(**data["table"]), cache_dir=cache
    )
    quiet_trainer({**config["trainer"], "callbacks": [Validations(), Report()]}).fit(model, module)


def search_tune(given: argparse.Namespace, trials: list[Trial], folder: Path, address: str, reuse: bool) -> None:
    """A search of Ray Tune with Optuna and ASHA."""
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
            mode="min",
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


# ---------------------------------------------------------------------- rounds


def measure(name: str, given: argparse.Namespace, address: str, validations: Path) -> Run:
    """A search in a fresh process."""
    validations.write_text("")
    with tempfile.TemporaryDirectory() as folder:
        begin = time.time()
        command = [sys.executable, __file__, *sys.argv[1:], "--contender", name, "--folder", folder]
        subprocess.run([*command, "--address", address], check=True, stdout=subprocess.DEVNULL)
        wall = time.time() - begin
    lines = [tuple(map(float, line.split())) for line in validations.read_text().splitlines()]
    inside = sum(seconds for seconds, _, _ in lines)
    return {
        "contender": name,
        "wall_seconds": wall,
        "inside_seconds": inside,
        "overhead_seconds": (given.workers * wall - inside) / given.trials,
        "validations": len(lines),
        "best_value": min(value for _, _, value in lines),
        "reports": [(when - begin, value) for _, when, value in lines],
    }


def add_targets(runs: list[Run]) -> None:
    """Add when each search of a round has first reported the highest best loss of the round."""
    target = max(run["best_value"] for run in runs)
    for run in runs:
        run["target"] = target
        run["to_target_seconds"] = min(when for when, value in run["reports"] if value <= target)


def cluster(workers: int) -> Any:
    """A Ray cluster of one node, with a CPU for each worker."""
    from ray.cluster_utils import Cluster

    return Cluster(initialize_head=True, head_node_args={"num_cpus": workers, "include_dashboard": False})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The same search by lightning-bge and by Ray Tune, on SICK.")
    add_shared_arguments(parser, "docs/benchmarks/ray_tune.json", lr=None)
    parser.add_argument("--trials", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument(
        "--rows", type=int, default=300, help="pairs, of which a fifth validates (default: %(default)s)"
    )
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
        validations = Path(folder, "validations")
        here = [str(Path(__file__).parent), str(REPOSITORY)]
        os.environ |= {VALIDATIONS: str(validations), "PYTHONPATH": os.pathsep.join(here), "RAY_AIR_NEW_OUTPUT": "0"}
        found = cluster(given.workers)
        for number in range(given.rounds):
            made = [measure(name, given, found.address, validations) for name in names]
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
    record = {"data": f"sick/train.tsv, first {given.rows} rows", **summary, "runs": runs}
    for name in ("contender", "folder", "address"):
        delattr(given, name)
    write_record(given.out, "ray_tune", given, record)
    about = (
        f"{given.trials} parameter sets on the first {given.rows} pairs of SICK, of which a fifth validates, "
        f"up to {given.epochs} epochs; {given.workers} workers with one CPU each. lightning-bge is `lightning-bge hpo "
        "--launcher ray` with its pruner `asha`; Ray Tune has `OptunaSearch` with the same list in "
        "`points_to_evaluate`, `ASHAScheduler` with the same reduction factor, and a trainable that trains the same "
        "module. `reuse_actors` keeps the processes from one trial to the next; it is off by default."
    )
    print(
        write_note(given.out, "The same search on a Ray cluster, with Ray Tune", [about, *tables(summary), DEFINITIONS])
    )


if __name__ == "__main__":
    main()
