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
    """A pruner with the options of a study."""
    return lambda study: policy_of(config, len(study.trials), steps_of(study))


def at_fold_ends(make: Callable[[Recording], BasePruner]) -> Callable[[Recording], Policy]:
    """A pruner that prunes nothing until min(30, 10 % of the trials) have run to their end."""

    def policy(study: Recording) -> Policy:
        pruner = StartupTrialsPruner(make(study), min(30, len(study.trials) // 10))
        return lambda recording, order, name: replay_pruned(recording, pruner, order, name)

    return policy


def steps_of(study: Recording) -> Steps:
    return Steps(study.folds, study.epochs, study.per_epoch)


def last_of_fold(study: Recording, inner: BasePruner) -> BasePruner:
    """A pruner that prunes only at the last step of each fold."""
    return WarmupPruner(inner, study.epochs * study.per_epoch, study.epochs * study.per_epoch - 1)


UNPRUNED = configured(PrunerConfig("none"))
# row, expected gain, and how it prunes
PRUNERS: dict[str, tuple[str, Callable[[Recording], Policy]]] = {
    "Hyperband, factor 4, one step per epoch": ("3-5x", configured(PrunerConfig("hyperband", fold_confidence=None))),
    "fold pruning: median pruner, only at the ends of folds": (
        "2-3x",
        at_fold_ends(lambda study: last_of_fold(study, MedianPruner(n_startup_trials=0))),
    ),
    "fold pruning: paired differences from the best trial": (
        "2-3x",
        at_fold_ends(lambda study: FoldEndPruner(None, study.epochs * study.per_epoch, study.folds)),
    ),
    "`asha`, the default": ("no figure", configured(PrunerConfig())),
}


def replay(orders: int, seed: int, curves: Path = CURVES) -> dict[str, Any]:
    """Hours without pruning over hours with it, for each pruner, study and random order.

    The figures are of the whole study, and of the time until a trial is within 1 % of the best.
    An order in which no trial is within 1 % of the best counts with the hours of the whole study without pruning.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found: dict[str, Any] = {name: {} for name in PRUNERS}
    for path in sorted(curves.glob("*.json")):
        study = Recording.load(path).coarser(1)
        draw, shuffled = random.Random(seed), []
        for _ in range(orders):
            shuffled.append(draw.sample(range(len(study.trials)), len(study.trials)))
        base = [_hours(study, UNPRUNED, order, number) for number, order in enumerate(shuffled)]
        for name, (_, policy) in PRUNERS.items():
            runs = [_hours(study, policy, order, number) for number, order in enumerate(shuffled)]
            pairs = list(zip(base, runs, strict=True))
            found[name][study.name] = {
                "whole": [full["whole"] / run["whole"] for full, run in pairs],
                "to_reach": [full["to_reach"] / run["to_reach"] for full, run in pairs],
                "reached": sum(run["reached"] for run in runs) / orders,
            }
    return found


def _hours(study: Recording, policy: Callable[[Recording], Policy], order: list[int], number: int) -> dict[str, float]:
    """Hours as shares of those of all complete trials."""
    run = policy(study)(study, order, f"order-{number}")
    reached = share_to_reach(study, run, WITHIN)
    return {
        "whole": run.seconds / study.full_seconds,
        "to_reach": 1.0 if reached is None else reached,
        "reached": reached is not None,
    }
