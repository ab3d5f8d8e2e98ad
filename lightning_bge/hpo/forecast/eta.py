"""When a running search will be done: from what its trials have taken, and what is still to come.

What a trial takes is known from those that have ended. How many steps there will be is not: a pruner decides that on
the way. So the rest of the search is simulated many times from its present state: with asha from the real ranking,
where a new trial has any place among those before it; with other pruners by what they do on simulated learning curves,
scaled to what they have done so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.config import BEST
from lightning_bge.hpo.forecast.asha_rest import UNKNOWN, AshaRest, elapsed
from lightning_bge.hpo.forecast.preview import simulated_steps
from lightning_bge.hpo.forecast.simulator import schedule
from lightning_bge.hpo.forecast.trial_times import TrialTimes
from lightning_bge.hpo.pruning.config import PrunerConfig, rungs, startup_trials
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.trials import ended_parameter_sets

RUNS = 100  # simulations of the rest of the search
MOST_TRIALS = 40_000  # of all simulations together: about a second


@dataclass(frozen=True)
class Eta:
    """Seconds until a search is done; in eight searches of ten it is between `low` and `high`."""

    low: float
    mid: float
    high: float


@dataclass(frozen=True)
class SearchOptions:
    """The options of a search that its duration depends on.

    Attributes:
        pruner: of the search.
        n_trials: how many trials are to be finished.
        steps: the steps of a trial that runs to its end.
        direction: of the score.
        sampler: of the search; with tpe the later parameter sets are better, and with asha more of them are resumed.
        n_seeds: with how many other seeds each of the best trials is run again.
        refit: whether a model is trained on all rows at the end.
        baseline: whether one trial more is run to its end, with the configured options.
    """

    pruner: PrunerConfig
    n_trials: int
    steps: Steps
    direction: Literal["maximize", "minimize"] = "maximize"
    sampler: str = "tpe"
    n_seeds: int = 0
    refit: bool = False
    baseline: bool = False


def estimate_end(
    trials: Sequence[FrozenTrial], search: SearchOptions, workers: int, now: datetime, n_replicated: int = 0
) -> Eta | None:
    """Estimate the seconds until all trials of a search are finished, with the range that holds in eight of ten.

    Args:
        trials: all of the study, in their order, running and waiting ones too. What they took is the time from start to
            end; their user attribute `curve` has the part of it that was training and validation.
        search: its options.
        workers: processes that run it now.
        now: local time without a time zone, as Optuna's times are.
        n_replicated: seed replicates that have ended.

    Returns:
        None where no trial has ended yet.
    """
    steps, times = search.steps, TrialTimes.read(trials, search.steps)
    if times is None:
        return None
    left = search.n_trials - ended_parameter_sets(trials)
    runs = max(20, min(RUNS, MOST_TRIALS // max(1, left)))
    random = np.random.default_rng(len(trials))
    if search.pruner.name == "asha":
        rest = AshaRest(
            trials,
            at=rungs(search.pruner, steps)[0],
            n_steps=steps.total,
            reduction_factor=search.pruner.reduction_factor,
            n_trials=search.n_trials,
            sign=1.0 if search.direction == "maximize" else -1.0,
            times=times,
            learns=search.sampler == "tpe",
        )
        found = [rest.run(random, workers, now) for _ in range(runs)]
    else:
        begun = [elapsed(trial, now) for trial in trials if trial.state == TrialState.RUNNING]
        found = [_simulate_pruned(trials, search, times, begun, random, workers) for _ in range(runs)]
    replicates = max(0, search.n_seeds * _n_best(trials, search) - n_replicated)
    whole = times.seconds(0, steps.total)
    after = (replicates / workers + search.baseline) * whole + search.refit * times.refit_seconds(steps)
    low, mid, high = np.quantile(np.array(found) + after, [0.1, 0.5, 0.9])
    return Eta(float(low), float(mid), float(high))


def _n_best(trials: Sequence[FrozenTrial], search: SearchOptions) -> int:
    """How many trials will have seed replicates: the best of those that run to their end, of which asha has few."""
    complete = sum(trial.state == TrialState.COMPLETE for trial in trials)
    if ended_parameter_sets(trials) < search.n_trials:
        n_rungs = len(rungs(search.pruner, search.steps)[0]) if search.pruner.name == "asha" else 0
        complete = max(1, complete, round(search.n_trials / search.pruner.reduction_factor**n_rungs))
    return min(BEST, complete)


def _simulate_pruned(
    trials: Sequence[FrozenTrial],
    search: SearchOptions,
    times: TrialTimes,
    begun: Sequence[float],
    random: np.random.Generator,
    workers: int,
) -> float:
    """Simulate once the seconds that the rest takes with a pruner that ends trials for good, or without one.

    Args:
        trials: all of the study.
        search: its options.
        times: what the trials so far took.
        begun: the seconds since each running trial has started.
        random: draws the learning curves and the speed of the machine and of each trial.
        workers: processes that share the search.
    """
    pruner, n_trials, steps = search.pruner, search.n_trials, search.steps
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    startup, done = startup_trials(pruner, n_trials), min(len(ended), n_trials)
    made = sum(len(trial.intermediate_values) for trial in ended[startup:])
    simulated = random.choice(simulated_steps(pruner, n_trials, steps))
    assumed = UNKNOWN * simulated[startup:].mean() if startup < n_trials else 1.0
    ratio = (made + assumed) / (simulated[startup:done].sum() + assumed)
    rest = np.minimum(simulated[done:] * np.where(np.arange(done, n_trials) < startup, 1.0, ratio), steps.total)
    seconds = np.array([times.seconds(0, count) for count in rest.tolist()]) + times.gap
    seconds *= times.spread(random, len(rest)) * times.factor(random)
    for number, passed in enumerate(begun[: len(rest)]):
        seconds[number] = max(0.0, seconds[number] - passed)
    return schedule(seconds.tolist(), workers)
