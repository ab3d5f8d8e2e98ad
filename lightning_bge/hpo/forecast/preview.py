"""What a pruner will do, before the first trial: by its rules, and on simulated learning curves."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from lightning_bge.hpo.forecast.recording import Curve, Recording
from lightning_bge.hpo.forecast.replay import policy_of
from lightning_bge.hpo.pruning.config import PrunerConfig, check_pruner, rungs, startup_trials
from lightning_bge.hpo.steps import Steps

STYLES = {"usual": (1.0, 1.0), "fast": (0.4, 1.0), "slow": (2.5, 1.0), "noisy": (1.0, 5.0)}  # slower, noise
SIMULATED = 120  # trials of a simulated study at most: half a second; larger ones are scaled up from it


@dataclass(frozen=True)
class Forecast:
    """What a pruner will do to a study.

    Attributes:
        first: the step at which a trial can first be stopped; None: never, as there is no pruner.
        brackets: for each bracket the steps at which it can stop a trial.
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
    """Estimate what a pruner will do to a study.

    The steps at which it can stop a trial follow from its rules. How many trials it stops, and what that saves, comes
    from running the pruner over learning curves that are drawn at random (`sample_curves`): a rough figure, as a real
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
    kept: float = sum(made == steps.total for made in run.steps)
    cost = run.seconds / recording.full_seconds
    if n_trials > count:  # the number of start-up trials does not grow with the rest
        free = min(startup_trials(config, n_trials), count)
        rest = (cost * count - free) / (count - free) if count > free else 1.0
        cost = (free + rest * (n_trials - free)) / n_trials
        kept = free + (kept - free) / max(count - free, 1) * (n_trials - free)
    return Forecast(
        min(step for bracket in brackets for step in bracket), brackets, round(n_trials - kept), n_trials, cost
    )


@cache
def simulated_steps(config: PrunerConfig, n_trials: int, steps: Steps) -> np.ndarray:
    """How many steps the trials of a study make, in their order, on learning curves of each style: [styles, trials].

    For pruners that end trials for good. Of a long study the first trials are simulated, and the later ones are
    assumed to be like the second half of these.
    """
    count = min(n_trials, SIMULATED // 2)
    if config.name == "none":
        return np.full((1, n_trials), float(steps.total))
    policy, found = policy_of(config, n_trials, steps), []
    for number, style in enumerate(STYLES):
        made = policy(sample_curves(count, steps, number, style), range(count), style).steps
        found.append([*made, *[float(np.mean(made[count // 2 :]))] * (n_trials - count)])
    return np.array(found, dtype=float)


def sample_curves(n_trials: int, steps: Steps, seed: int = 0, style: str = "usual") -> Recording:
    """Made-up learning curves: saturating, of different speeds and ends, with noise, harder and easier folds.

    One trial in five learns nothing. Every step takes one second.

    Args:
        n_trials: how many.
        steps: the steps of each.
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
    """Describe in a few lines, before the study starts, what will be pruned and when.

    Raises:
        ConfigError: the pruner could never prune.
    """
    found = forecast(config, n_trials, steps)
    if found.first is None:
        return "no pruning: every trial runs to its end"
    asha = config.name == "asha"
    where = f"rungs at steps {found.brackets[0]}; " if asha else ""
    if config.name == "hyperband" and config.patience is None:
        where = f"brackets prune at steps {found.brackets}; "
    lines = [f"{config.name}: {where}can first {'pause' if asha else 'prune'} at step {found.first} of {steps.total}"]
    if config.name == "hyperband" and config.patience is not None:
        lines.append(
            "warning: with hpo.pruner.patience around hyperband a trial that still improves is never pruned, however "
            "bad it is, and values of late steps are compared with those of early ones. Use hyperband without "
            "patience, or patience with median or percentile"
        )
    if count := startup_trials(config, n_trials):
        lines.append(f"nothing is pruned until {count} of {n_trials} trials have run to their end")
    lines.append(
        f"on simulated learning curves about {found.pruned:,} of {n_trials:,} trials would "
        f"{'stay paused' if asha else 'be pruned'}, using {found.cost:.0%} of the full cost"
    )
    return "\n".join(lines)
