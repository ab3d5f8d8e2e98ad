"""Pruners and schedulers on recorded searches: what each would have spent, and what it would have found.

    python examples/benchmarks/pruner_replay.py                     # the curves of docs/benchmarks/curves, 200 orders

No model is trained: `record_searches.py` has recorded searches whose trials all ran to their end, and each contender
runs them again, in the same random orders as all others. Bootstrap, where a contender has one: min(30, 10 % of the
trials).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from common import git_commit, markdown_table, versions
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.pruning import PrunerConfig, bootstrap_trials
from lightning_bge.hpo.replay import (
    Policy,
    Recording,
    Replay,
    mean_regret,
    oracle,
    policy_of,
    regret,
    replay_pruned,
    share_to_reach,
)
from lightning_bge.hpo.reports import Steps
from lightning_bge.runs import write_json, write_text

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"
WITHIN = 0.01
UNPRUNED, ORACLE, MEDIAN, HYPERBAND = "unpruned", "oracle", "Optuna's MedianPruner()", "Optuna's HyperbandPruner()"
DEFAULT = PrunerConfig()
PERCENTILES = (50.0, 33.0, 25.0, 15.0)

DEFINITIONS = f"""\
All shares are of the seconds that the search takes when every trial runs to its end.

- **to reach**: what is spent until a trial has ended whose value is within {WITHIN:.0%} of the best of all; the mean
  over the orders, an order in which that never happens counting as 100 %.
- **reached**: the share of orders in which it happens.
- **in all**: what the whole search spends.
- **regret**: how far the best value found at the end is from the best of all, as a share of it.
- **mean regret**: the regret's mean over the time that the search takes without pruning, 1 before any trial has ended:
  one number for speed and for the end.
- **oracle**: knows each trial's end before it starts and runs only those that become the best so far.
- What `promote` needs to write and to read a paused trial's checkpoint is not in its seconds."""


@dataclass(frozen=True)
class Contender:
    """What runs the trials again.

    Attributes:
        policy: made for a recording.
        per_epoch: reports of an epoch.
        config: as in YAML; None: none of the product's.
    """

    policy: Callable[[Recording], Policy]
    per_epoch: int
    config: PrunerConfig | None = None


def contenders(per_epoch: int) -> dict[str, Contender]:
    """All of them, by name, for recordings with so many reports an epoch."""

    def optunas(make: Callable[[], BasePruner]) -> Callable[[Recording], Policy]:
        return lambda _: lambda recording, order, name: replay_pruned(recording, make(), order, name)

    def ours(config: PrunerConfig, reports: int = per_epoch) -> Contender:
        def policy(recording: Recording) -> Policy:
            steps = Steps(recording.folds, recording.epochs, recording.per_epoch)
            return policy_of(config, len(recording.trials), steps)

        return Contender(policy, reports, config)

    found = {
        UNPRUNED: ours(PrunerConfig("none")),
        ORACLE: Contender(lambda _: oracle, per_epoch),
        MEDIAN: Contender(optunas(MedianPruner), per_epoch),
        HYPERBAND: Contender(optunas(HyperbandPruner), per_epoch),
    }
    configs = [
        PrunerConfig("disarmed_hyperband", max_resource=5, patience=3),
        PrunerConfig("hyperband", fold_confidence=None),
        PrunerConfig("hyperband"),
        PrunerConfig("hyperband", min_resource=3),
        PrunerConfig("hyperband", min_resource=3, reach=2),
        *(PrunerConfig("percentile", percentile=share) for share in PERCENTILES),
        PrunerConfig("percentile", percentile=25.0, warmup_reports=0),
        PrunerConfig("median", patience=1),
        PrunerConfig("reach", reach=2, warmup_reports=0),
        PrunerConfig("reach", reach=2, fold_confidence=None),
        *(PrunerConfig("reach", reach=best) for best in (1, 2, 3)),
        # the first rung in reports; None: after the first epoch
        *(PrunerConfig("promote", eta, first) for first in (1, None, 3, 4) for eta in (2, 3, 4)),
    ]
    found |= {describe(config): ours(config) for config in configs}
    if per_epoch > 1:
        for config in (PrunerConfig("promote", 3), PrunerConfig("promote", 4), PrunerConfig("reach")):
            found[f"{describe(config)}, one report an epoch"] = ours(config, 1)
    return found


def describe(config: PrunerConfig) -> str:
    """The settings that are not the pruner's usual ones."""
    usual = PrunerConfig(config.name, patience=0) if config.name == "disarmed_hyperband" else PrunerConfig(config.name)
    changed = [
        f"{key} {value:g}"
        for key, value in vars(config).items()
        if key != "name" and value != getattr(usual, key) and value is not None
    ]
    if config.fold_confidence is None and usual.fold_confidence is not None:
        changed.append("not between folds")
    return ", ".join([config.name, *changed])


def run(path: Path, name: str, orders: int, seed: int) -> list[tuple[Replay, dict[str, Any]]]:
    """One contender on one recording, in all orders."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    fine = Recording.load(path)
    contender = contenders(fine.per_epoch)[name]
    recording = fine if contender.per_epoch == fine.per_epoch else fine.coarser(contender.per_epoch)
    draw, found = random.Random(seed), []
    for number in range(orders):
        order = list(range(len(recording.trials)))
        draw.shuffle(order)
        replayed = contender.policy(recording)(recording, order, f"order-{number}")
        reached = share_to_reach(fine, replayed, WITHIN)
        figures = {
            "to_reach": 1.0 if reached is None else min(reached, 1.0),
            "reached": reached is not None,
            "in_all": replayed.seconds / fine.full_seconds,
            "regret": regret(fine, replayed, float("inf")),
            "mean_regret": mean_regret(fine, replayed),
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


def leave_one_out(table: dict[str, dict[str, dict[str, float]]], candidates: list[str]) -> dict[str, dict[str, Any]]:
    """For each search: the candidate that is best on all others, and how it does on this one."""
    found = {}
    for left in table:
        others = [name for name in table if name != left]
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
        "The product's default is `"
        + record["default"]
        + "`; its bootstrap is min(30, 10 % of the trials): "
        + ", ".join(f"{info['bootstrap']} of {info['trials']} ({name})" for name, info in record["searches"].items())
        + ".",
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
        "What the other spends or misses more than the default, in points of a hundred: mean, and the 95 % interval of "
        "the mean by the bootstrap over the orders. The orders are of the same trials: the interval says how sure the "
        "mean over orders is, not how another search would go.",
        markdown_table(["search", "against", "mean", "from", "to"], rows),
        "## Chosen with one search left out",
        "For each search the pruner with the least mean `to reach` on the other ones, and how it does on this one:",
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
    """Run all contenders on all recordings."""
    table: dict[str, dict[str, Any]] = {}
    searches, differences = {}, {}
    refused: dict[str, str] = {}
    default = describe(DEFAULT)
    for path in paths:
        recording = Recording.load(path)
        able = contenders(recording.per_epoch)
        for name, contender in list(able.items()):
            try:
                contender.policy(recording)
            except ConfigError as error:
                refused[name] = str(error)
                del able[name]
        with ProcessPoolExecutor(chosen.jobs) as pool:
            runs = dict(
                zip(able, pool.map(partial(run, path, orders=chosen.orders, seed=chosen.seed), able), strict=True)
            )
        values = [trial.value for trial in recording.trials if trial.value is not None]
        table[recording.name] = {name: means(found) for name, found in runs.items()}
        searches[recording.name] = {
            "trials": len(recording.trials),
            "reports": recording.n_reports,
            "hours": recording.full_seconds / 3600,
            "best": recording.best,
            "worst": min(values) if recording.direction == "maximize" else max(values),
            "near_best": sum(abs(value - recording.best) <= WITHIN * abs(recording.best) for value in values),
            "bootstrap": bootstrap_trials(DEFAULT, len(recording.trials)),
            "about": recording.about,
        }
        others = {name: runs[name] for name in (MEDIAN, HYPERBAND, UNPRUNED)}
        differences[recording.name] = compare(recording, runs[default], others)
        print(f"{recording.name}: {len(runs)} contenders", flush=True)
    shared = set.intersection(*(set(rows) for rows in table.values()))
    candidates = [name for name, one in contenders(2).items() if name in shared and one.config is not None]
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "versions": versions(),
        "orders": chosen.orders,
        "seed": chosen.seed,
        "default": default,
        "searches": searches,
        "refused": refused,
        "table": table,
        "differences": differences,
        "left_out": leave_one_out(table, candidates),
    }


if __name__ == "__main__":
    main()
