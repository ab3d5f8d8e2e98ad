"""What a pruner will do, found out before the first trial: by its rules, and on simulated learning curves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from lightning_bge.hpo.forecast.replay import Curve, Recording, policy_of
from lightning_bge.hpo.pruning.config import PrunerConfig, bootstrap_trials, check_pruner, optuna_bootstrap, rungs
from lightning_bge.hpo.steps import Steps

STYLES = {"usual": (1.0, 1.0), "fast": (0.4, 1.0), "slow": (2.5, 1.0), "noisy": (1.0, 5.0)}  # slower, noise
SIMULATED = 120  # trials of a simulated study at most: half a second; larger ones are scaled up from it


@dataclass(frozen=True)
class Forecast:
    """What a study will be like.

    Attributes:
        first: the report at which a trial can first be stopped; None: never, as there is no pruner.
        brackets: for each bracket the reports at which it can stop a trial.
        pruned: trials that would be stopped, of `trials`.
        trials: all trials of the study.
        cost: the study's training over that without pruning, 0 to 1.
    """

    first: int | None
    brackets: list[list[int]]
    pruned: int
    trials: int
    cost: float


def forecast(config: PrunerConfig, n_trials: int, steps: Steps, seed: int = 0) -> Forecast:
    """Work out what a pruner will do to a study.

    The reports at which it can stop a trial follow from its rules. How many trials it stops, and what that saves, comes
    from running it, itself, over learning curves that are drawn at random (`sample_curves`): a rough figure, as a real
    study's curves are not known before.

    Raises:
        ConfigError: the pruner could never prune.
    """
    check_pruner(config, n_trials, steps)
    brackets = rungs(config, steps)
    if not brackets:
        return Forecast(None, [], 0, n_trials, 1.0)
    count = min(n_trials, SIMULATED)
    recording = sample_curves(count, steps, seed)
    run = policy_of(config, n_trials, steps)(recording, range(count), "simulated")
    kept: float = sum(made == steps.total for made in run.reports)
    cost = run.seconds / recording.full_seconds
    if n_trials > count:  # the warm-up is of so many trials, however many follow
        free = min(bootstrap_trials(config, n_trials), count)
        rest = (cost * count - free) / (count - free) if count > free else 1.0
        cost = (free + rest * (n_trials - free)) / n_trials
        kept = free + (kept - free) / max(count - free, 1) * (n_trials - free)
    return Forecast(
        min(step for bracket in brackets for step in bracket), brackets, round(n_trials - kept), n_trials, cost
    )


@cache
def simulated_reports(config: PrunerConfig, n_trials: int, steps: Steps) -> np.ndarray:
    """How many reports the trials of a study make, in their order, on learning curves of each style: [styles, trials].

    For pruners that end trials for good. Of a long study the first trials are simulated, and the later ones are taken
    to be like the second half of these.
    """
    count = min(n_trials, SIMULATED // 2)
    if config.name == "none":
        return np.full((1, n_trials), float(steps.total))
    policy, found = policy_of(config, n_trials, steps), []
    for number, style in enumerate(STYLES):
        made = policy(sample_curves(count, steps, number, style), range(count), style).reports
        found.append([*made, *[float(np.mean(made[count // 2 :]))] * (n_trials - count)])
    return np.array(found, dtype=float)


def sample_curves(n_trials: int, steps: Steps, seed: int = 0, style: str = "usual") -> Recording:
    """Learning curves as they may be: saturating, of different speeds and ends, with noise, harder and easier folds.

    One trial in five learns nothing. Every report costs one second.

    Args:
        n_trials: how many.
        steps: what each reports.
        seed: of the random numbers.
        style: one of `STYLES`.
    """
    slower, noise = STYLES[style]
    rng = np.random.default_rng(seed)
    epochs = np.arange(1, steps.per_fold + 1) / steps.per_epoch
    harder = rng.normal(0, 0.03, steps.folds)
    curves = []
    for number in range(n_trials):
        end = 0.3 + 0.6 * rng.beta(3, 2) * (rng.random() > 0.2)
        tau = steps.epochs * rng.lognormal(-1.2, 0.5) * slower
        rise = 0.3 + (end - 0.3) * (1 - np.exp(-epochs / tau)) / (1 - math.exp(-steps.epochs / tau))
        folds = rise + harder[:, None] + rng.normal(0, 0.015, (steps.folds, 1))
        best = np.maximum.accumulate(folds + rng.normal(0, 0.01, folds.shape) * noise, axis=1)
        before = np.concatenate([[0.0], np.cumsum(best[:, -1])[:-1]])
        means = ((before[:, None] + best) / np.arange(1, steps.folds + 1)[:, None]).ravel()
        ones, none = (1.0,) * steps.total, (0.0,) * steps.total
        curves.append(Curve(number, {}, float(means[-1]), tuple(means.tolist()), ones, none))
    return Recording("simulated", "maximize", steps.folds, steps.epochs, steps.per_epoch, {}, tuple(curves))


def describe_pruner(config: PrunerConfig, n_trials: int, steps: Steps) -> str:
    """Say in a few lines what will be pruned when, before the study starts.

    Raises:
        ConfigError: As in `forecast`.
    """
    found = forecast(config, n_trials, steps)
    if found.first is None:
        return "no pruning: every trial runs to its end"
    can, stopped = ("pause", "stay paused") if config.name == "promote" else ("prune", "be pruned")
    several = config.name == "hyperband" and config.patience is None
    brackets = f"brackets judge at reports {found.brackets}; " if several else ""
    if config.name == "promote":
        brackets = f"rungs at reports {found.brackets[0]}; "
    lines = [f"{config.name}: {brackets}can first {can} at report {found.first} of {steps.total}"]
    count = bootstrap_trials(config, n_trials)
    if config.name == "disarmed_hyperband":
        lines.append(
            f"what it really does: a trial that still improves is never pruned, however bad it is, and the first "
            f"{optuna_bootstrap(config)} to be judged at a rung are pruned"
        )
    elif config.name == "hyperband" and config.patience is not None:
        lines.append(
            "patience disarms hyperband: a trial that still improves is never pruned, however bad it is, and late "
            "values are compared with early ones; use it with median or percentile, or hpo.pruner.reach instead"
        )
    if count:
        lines.append(f"the first {count} of {n_trials} trials to finish run to their end")
    lines.append(
        f"on simulated learning curves about {found.pruned:,} of {n_trials:,} trials would {stopped}, using "
        f"{found.cost:.0%} of the full cost"
    )
    return "\n".join(lines)
