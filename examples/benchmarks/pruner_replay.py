"""Pruners and schedulers on recorded searches: what each would have spent, and what it would have found.

    python examples/benchmarks/pruner_replay.py                     # the curves of docs/benchmarks/curves, 200 orders

No model is trained: `record_searches.py` has recorded searches whose trials all ran to their end, and each contender
runs them again, in the same random orders as all others. Where a contender has start-up trials, they are
min(30, 10 % of the trials).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from common import git_commit, markdown_table, versions
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner
from replay_figures import mean_regret, oracle, regret, share_to_reach

from lightning_bge.hpo.forecast.recording import Recording
from lightning_bge.hpo.forecast.replay import Policy, Replay, policy_of, replay_pruned
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Steps
from lightning_bge.runtime.run_folder import write_json, write_text

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"
WITHIN = 0.01
UNPRUNED, ORACLE, MEDIAN, HYPERBAND = "unpruned", "oracle", "Optuna's MedianPruner()", "Optuna's HyperbandPruner()"
DEFAULT = PrunerConfig()
PERCENTILES = (50.0, 33.0, 25.0, 15.0)

DEFINITIONS = f"""\
All shares are shares of the seconds of the search in which every trial is completed, with as many reports an epoch.

- **to reach**: what is spent until a trial has ended whose value is within {WITHIN:.0%} of the best of all; the mean
  over the orders, an order in which that never happens counting as 100 %.
- **reached**: the share of orders in which it happens.
- **in all**: what the whole search takes.
- **regret**: how far the best value found at the end is from the best of all, as a share of it.
- **mean regret**: the regret's mean over the time that the search takes without pruning, 1 before any trial has ended:
  one number for speed and for the end.
- **oracle**: knows each trial's result before its start, and runs only those that become the best so far.
- Writing and reading the checkpoints of paused trials is not included in the seconds of `asha`."""


Contender = Callable[[Recording], Policy]


def contenders() -> dict[str, Contender]:
    """All of them, by name; rungs and warm-ups are in reports."""

    def optunas(make: Callable[[], BasePruner]) -> Contender:
        return lambda _: lambda recording, order, name: replay_pruned(recording, make(), order, name)

    found: dict[str, Contender] = {ORACLE: lambda _: oracle, MEDIAN: optunas(MedianPruner)}
    found |= {HYPERBAND: optunas(HyperbandPruner), UNPRUNED: partial(ours, PrunerConfig("none"))}
    return found | {describe(config): partial(ours, config) for config in configs()}


def configs() -> list[PrunerConfig]:
    """The product's pruners, as in YAML."""
    return [
        PrunerConfig("hyperband", patience=3),
        PrunerConfig("hyperband", fold_confidence=None),
        PrunerConfig("hyperband"),
        PrunerConfig("hyperband", min_resource=3),
        *(PrunerConfig("percentile", percentile=share) for share in PERCENTILES),
        PrunerConfig("percentile", percentile=25.0, n_warmup_steps=0),
        PrunerConfig("median", patience=1),
        # the first rung in reports; None: after the first epoch
        *(PrunerConfig("asha", eta, first) for first in (None, 1, 3, 4) for eta in (2, 3, 4)),
    ]


def ours(config: PrunerConfig, recording: Recording) -> Policy:
    """What a study with these settings does."""
    steps = Steps(recording.folds, recording.epochs, recording.per_epoch)
    return policy_of(config, len(recording.trials), steps)


def describe(config: PrunerConfig) -> str:
    """The settings that are not the pruner's usual ones."""
    usual = PrunerConfig(config.name)
    changed = [
        f"{key} {value:g}"
        for key, value in vars(config).items()
        if key != "name" and value != getattr(usual, key) and value is not None
    ]
    if config.fold_confidence is None and usual.fold_confidence is not None:
        changed.append("not between folds")
    return ", ".join([config.name, *changed])


def run(recording: Recording, name: str, orders: int, seed: int) -> list[tuple[Replay, dict[str, Any]]]:
    """One contender on one recording, in all orders."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    policy, draw, found = contenders()[name](recording), random.Random(seed), []
    for number in range(orders):
        order = list(range(len(recording.trials)))
        draw.shuffle(order)
        replayed = policy(recording, order, f"order-{number}")
        reached = share_to_reach(recording, replayed, WITHIN)
        figures = {
            "to_reach": 1.0 if reached is None else min(reached, 1.0),
            "reached": reached is not None,
            "in_all": replayed.seconds / recording.full_seconds,
            "regret": regret(recording, replayed, float("inf")),
            "mean_regret": mean_regret(recording, replayed),
        }
        found.append((replayed, figures))
    return found


def interval(differences: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean of paired differences, and its 95 % interval by the bootstrap over the orders."""
    values = np.asarray(differences, dtype=float)
    drawn = np.random.default_rng(seed).integers(0, len(values), (4000, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def means(runs: list[tuple[Replay, dict[str, Any]]]) -> dict[str, float]:
    """Each figure's mean over the orders."""
    return {key: float(np.mean([figures[key] for _, figures in runs])) for key in runs[0][1]}


def leave_one_out(table: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """For each search: the product's pruner that is best on all others with as many reports, and how it does here."""
    found = {}
    candidates = [describe(config) for config in configs()]
    for left in table:
        others = [name for name in table if name != left and name.split(", ")[1] == left.split(", ")[1]]
        chosen = min(candidates, key=lambda one: np.mean([table[other][one]["to_reach"] for other in others]))
        found[left] = {"chosen": chosen, **table[left][chosen]}
    return found


def compare(
    recording: Recording, default: list[tuple[Replay, dict[str, Any]]], others: dict[str, Any]
) -> dict[str, tuple[float, float, float]]:
    """Paired differences, order by order: what the others spend or miss more than the default."""
    found = {
        f"{name}: to reach": interval(
            [theirs["to_reach"] - ours["to_reach"] for (_, theirs), (_, ours) in zip(runs, default, strict=True)]
        )
        for name, runs in others.items()
    }
    # unpruned, stopped after the seconds that the default's whole search took in the same order
    found["unpruned for equal hours: regret"] = interval(
        [
            regret(recording, full, ours.seconds) - figures["regret"]
            for (full, _), (ours, figures) in zip(others[UNPRUNED], default, strict=True)
        ]
    )
    return found


def percent(value: float) -> str:
    return f"{value:.1%}" if abs(value) < 0.1 else f"{value:.0%}"


def write_notes(out: Path, record: dict[str, Any]) -> None:
    """The Markdown beside the JSON."""
    parts = [
        "# Pruners and schedulers, replayed on recorded searches",
        f"Written {record['written']} at commit {record['git_commit']} by `examples/benchmarks/pruner_replay.py`: "
        f"{record['orders']} random orders of the trials of each search, the same for all. "
        f"optuna {record['versions']['optuna']}.",
        f"The default of this package is `{record['default']}` with one report an epoch; it has no start-up trials, as "
        "it ends no trial for good. The other pruners of this package have min(30, 10 % of the trials): 4 of 40, 6 of "
        "60.",
        DEFINITIONS,
    ]
    for name, info in record["searches"].items():
        rows = [
            [one, *(percent(found[key]) for key in ("to_reach", "reached", "in_all", "regret", "mean_regret"))]
            for one, found in sorted(record["table"][name].items(), key=lambda item: item[1]["to_reach"])
        ]
        header = ["", "to reach", "reached", "in all", "regret", "mean regret"]
        text = (
            f"{info['trials']} trials of {info['reports']} reports, {info['hours']:.2f} h unpruned; values from "
            f"{info['worst']:.3f} to {info['best']:.3f}; {info['near_best']} within {WITHIN:.0%} of the best."
        )
        parts += [f"## {name}", text, markdown_table(header, rows)]
    rows = [
        [search, name, *(f"{100 * value:+.1f}" for value in found)]
        for search, differences in record["differences"].items()
        for name, found in differences.items()
    ]
    parts += [
        "## The default against others, order by order",
        "What the other one takes or misses in excess of the default, in percentage points: the mean, and its 95 % "
        "interval by the bootstrap over the orders. All orders are of the same trials: the interval is that of the "
        "mean over orders, and does not contain the difference between searches.",
        markdown_table(["search", "against", "mean", "from", "to"], rows),
        "## Chosen with one search left out",
        "For each search the pruner with the lowest mean of `to reach` on the other ones, and its results on this one:",
        markdown_table(
            ["left out", "chosen", "to reach", "reached", "in all", "regret"],
            [
                [name, f["chosen"], *(percent(f[key]) for key in ("to_reach", "reached", "in_all", "regret"))]
                for name, f in record["left_out"].items()
            ],
        ),
    ]
    write_text(out.with_suffix(".md"), "\n\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, default=DOCS / "curves", help="folder of recordings")
    parser.add_argument("--orders", type=int, default=200, help="random orders of the trials; default 200")
    parser.add_argument("--seed", type=int, default=0, help="of the orders; default 0")
    parser.add_argument("--jobs", type=int, default=2, help="processes; default 2")
    parser.add_argument("--out", type=Path, default=DOCS / "pruner_replay.json")
    chosen = parser.parse_args()
    paths = sorted(chosen.curves.glob("*.json"))
    if not paths:
        raise SystemExit(f"no recordings in {chosen.curves}: run record_searches.py first")
    record = measure(paths, chosen)
    write_json(chosen.out, record)
    write_notes(chosen.out, record)
    print(chosen.out.with_suffix(".md").read_text())


def measure(paths: list[Path], chosen: argparse.Namespace) -> dict[str, Any]:
    """Run all contenders on all recordings, as they are and with one report an epoch."""
    table: dict[str, dict[str, Any]] = {}
    searches, differences = {}, {}
    for fine, per_epoch in ((Recording.load(path), count) for count in (1, 2) for path in paths):
        recording = fine.coarser(per_epoch)
        key = f"{recording.name}, {per_epoch} report{'s' * (per_epoch > 1)} an epoch"
        with ProcessPoolExecutor(chosen.jobs) as pool:
            one = partial(run, recording, orders=chosen.orders, seed=chosen.seed)
            runs = dict(zip(contenders(), pool.map(one, contenders()), strict=True))
        values = [trial.value for trial in recording.trials if trial.value is not None]
        table[key] = {name: means(found) for name, found in runs.items()}
        searches[key] = {
            "trials": len(recording.trials),
            "reports": recording.n_steps,
            "hours": recording.full_seconds / 3600,
            "best": recording.best,
            "worst": min(values) if recording.direction == "maximize" else max(values),
            "near_best": sum(abs(value - recording.best) <= WITHIN * abs(recording.best) for value in values),
            "n_startup_trials": min(30, len(recording.trials) // 10),
            "about": recording.about,
        }
        others = {name: runs[name] for name in (MEDIAN, HYPERBAND, UNPRUNED)}
        differences[key] = compare(recording, runs[describe(DEFAULT)], others)
        print(f"{key}: {len(runs)} contenders", flush=True)
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "versions": versions(),
        "orders": chosen.orders,
        "seed": chosen.seed,
        "default": describe(DEFAULT),
        "searches": searches,
        "table": table,
        "differences": differences,
        "left_out": leave_one_out(table),
    }


if __name__ == "__main__":
    main()
