"""The gain of pruning, replayed from recorded studies: no model is trained."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner, MedianPruner
from replay_figures import share_to_reach

from lightning_bge.hpo.forecast.recording import Recording
from lightning_bge.hpo.forecast.replay import Policy, policy_of, replay_pruned
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.pruning.pruners import FoldEndPruner, StartupTrialsPruner, WarmupPruner
from lightning_bge.hpo.steps import Steps

CURVES = Path(__file__).parents[2] / "docs" / "benchmarks" / "curves"
WITHIN = 0.01


def configured(config: PrunerConfig) -> Callable[[Recording], Policy]:
    """A pruner as a study has it."""
    return lambda search: policy_of(config, len(search.trials), steps_of(search))


def at_fold_ends(make: Callable[[Recording], BasePruner]) -> Callable[[Recording], Policy]:
    """A pruner that prunes nothing until min(30, 10 % of the trials) have run to their end."""

    def policy(search: Recording) -> Policy:
        pruner = StartupTrialsPruner(make(search), min(30, len(search.trials) // 10))
        return lambda recording, order, name: replay_pruned(recording, pruner, order, name)

    return policy


def steps_of(search: Recording) -> Steps:
    return Steps(search.folds, search.epochs, search.per_epoch)


def last_of_fold(search: Recording, inner: BasePruner) -> BasePruner:
    """Ask a pruner at the last report of each fold alone."""
    return WarmupPruner(inner, search.epochs * search.per_epoch, search.epochs * search.per_epoch - 1)


UNPRUNED = configured(PrunerConfig("none"))
# row, expected gain, and how it prunes
PRUNERS: dict[str, tuple[str, Callable[[Recording], Policy]]] = {
    "Hyperband, factor 4, an epoch a report": ("3-5x", configured(PrunerConfig("hyperband", fold_confidence=None))),
    "fold pruning: the median, asked at the folds' ends alone": (
        "2-3x",
        at_fold_ends(lambda search: last_of_fold(search, MedianPruner(n_startup_trials=0))),
    ),
    "fold pruning: paired differences from the best trial": (
        "2-3x",
        at_fold_ends(lambda search: FoldEndPruner(None, search.epochs * search.per_epoch, search.folds)),
    ),
    "`asha`, the default here": ("no figure", configured(PrunerConfig())),
}


def replay(orders: int, seed: int, curves: Path = CURVES) -> dict[str, Any]:
    """For each pruner and search, order by order: unpruned hours over its own, and of the hours to near the best.

    An order in which a pruner never ends a trial within 1 % of the best counts as taking the unpruned search's hours.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found: dict[str, Any] = {name: {} for name in PRUNERS}
    for path in sorted(curves.glob("*.json")):
        search = Recording.load(path).coarser(1)
        draw, shuffled = random.Random(seed), []
        for _ in range(orders):
            shuffled.append(draw.sample(range(len(search.trials)), len(search.trials)))
        base = [_hours(search, UNPRUNED, order, number) for number, order in enumerate(shuffled)]
        for name, (_, policy) in PRUNERS.items():
            runs = [_hours(search, policy, order, number) for number, order in enumerate(shuffled)]
            pairs = list(zip(base, runs, strict=True))
            found[name][search.name] = {
                "whole": [full["whole"] / run["whole"] for full, run in pairs],
                "to_reach": [full["to_reach"] / run["to_reach"] for full, run in pairs],
                "reached": sum(run["reached"] for run in runs) / orders,
            }
    return found


def _hours(search: Recording, policy: Callable[[Recording], Policy], order: list[int], number: int) -> dict[str, float]:
    """As shares of all trials' hours."""
    run = policy(search)(search, order, f"order-{number}")
    reached = share_to_reach(search, run, WITHIN)
    return {
        "whole": run.seconds / search.full_seconds,
        "to_reach": 1.0 if reached is None else reached,
        "reached": reached is not None,
    }
