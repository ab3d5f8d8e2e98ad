"""The rest of a running search with asynchronous successive halving: its state now, simulated many times to the end."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.forecast.simulator import STARTUP, AshaSimulation, Durations, Running, skill
from lightning_bge.hpo.forecast.trial_times import TrialTimes
from lightning_bge.hpo.pruning.asha_trials import AshaTrials
from lightning_bge.hpo.pruning.halving import Entry, Halving
from lightning_bge.hpo.trials import RESUMES, any_complete, ended_parameter_sets, latest_trials

LAST_PLACES = 30  # the places of so many trials at the first rung are those of the next ones
UNKNOWN = 20  # as if so many trials had had any place: what was seen has to outweigh them


class AshaRest:
    """The rest of a search with asynchronous successive halving.

    Parameter sets are numbered anew here, without gaps, in the order of their first trials.

    Args:
        trials: all trials of the study.
        at: the rungs' steps, ascending.
        n_steps: steps of a trial that runs to its end.
        reduction_factor: of the parameter sets that reach a rung, one in this many trains on.
        n_trials: parameter sets of the study in all.
        sign: 1 where a higher score is better, else -1.
        times: what the trials so far took.
        learns: whether the sampler learns, so that later parameter sets are better.
    """

    def __init__(
        self,
        trials: Sequence[FrozenTrial],
        *,
        at: Sequence[int],
        n_steps: int,
        reduction_factor: int,
        n_trials: int,
        sign: float,
        times: TrialTimes,
        learns: bool,
    ) -> None:
        self.n_trials, self.times, self.learns = n_trials, times, learns
        self.ended = ended_parameter_sets(trials)
        self.stages = [times.seconds(start, end) for start, end in pairwise([0, *at, n_steps])]
        self.known = [
            (number, latest)
            for number, latest in sorted(latest_trials(trials).items())
            if latest.state != TrialState.WAITING
        ]
        self.own = {i: times.ratios[one.number] for i, (_, one) in enumerate(self.known) if one.number in times.ratios}
        self.halving = Halving(len(at), reduction_factor)
        if any_complete(trials):
            self.halving.complete()
        self.places: list[float] = []  # at the first rung, 0 to 1: the place of each among those before it
        self.before: list[list[float]] = [[] for _ in at]  # at the rung before, of those at each rung; lower is better
        self.reached: dict[int, float] = {}  # the value of each at the last rung that it has reached
        self.rungs: dict[int, int] = {}  # how many rungs each has reached
        found = AshaTrials(at, reduction_factor, sign)
        found.add(trials)
        self._read_rungs(found.standings, found.paused)

    def _read_rungs(self, values: dict[int, dict[int, float]], paused: set[int]) -> None:
        random = np.random.default_rng(0)
        for i, (number, _) in enumerate(self.known):
            found = values.get(number, {})
            self.rungs[i] = len(found)
            for rung, value in found.items():
                if rung:
                    insort(self.before[rung], -found[rung - 1])
                self.reached[i] = value
                place = self.halving.add(i, rung, value, paused=number in paused and rung == max(found))
                count = len(self.halving.ranking[0])
                if rung == 0 and count > 1:
                    self.places.append((place + random.random()) / count)

    def run(self, random: np.random.Generator, workers: int, now: datetime) -> float:
        """Simulate it once; returns the seconds until the search is done.

        Args:
            random: draws the speed of the machine and of each trial, and the values at the rungs.
            workers: processes that share the search.
            now: local time without a time zone, as Optuna's times are.
        """
        halving, count = self.halving.copy(), len(self.known) + max(0, self.n_trials - self.ended) + workers
        spread = self.times.spread(random, count)
        spread[list(self.own)] = list(self.own.values())
        seconds = np.outer(spread * self.times.factor(random), self.stages)
        nothing, stages = np.zeros_like(seconds), len(self.stages)
        simulation = AshaSimulation(
            halving,
            self.n_trials,
            range(1, stages),
            Durations(np.full(count, self.times.gap), seconds, nothing, nothing),
            value=_Values(self, halving, random),
            ended=self.ended,
            started=len(self.known),
            running=self._running(seconds, now),
        )
        return simulation.run(workers).wall

    def _running(self, seconds: np.ndarray, now: datetime) -> list[Running]:
        found = []
        for i, (_, latest) in enumerate(self.known):
            if latest.state == TrialState.RUNNING:
                first, stage = RESUMES not in latest.user_attrs, self.rungs[i]
                whole = seconds[i, 0 if first else stage : stage + 1].sum()
                found.append(Running(max(0.0, whole - elapsed(latest, now)), i, stage, first))
        return found


class _Values:
    """Values of the parameter sets that get to a rung, drawn at random in one simulation.

    At the first rung a new one has the place of one of the last ones there, or any place: a Bayesian bootstrap. At a
    later rung it has the place that its value at the rung before would give it, or any place; how often which is drawn
    for each simulation, as little is known of it.
    """

    def __init__(self, rest: AshaRest, halving: Halving, random: np.random.Generator) -> None:
        self.halving, self.random = halving, random
        self.before = [list(rung) for rung in rest.before]
        self.reached = dict(rest.reached)
        self.last = rest.places[-LAST_PLACES:]
        self.bounds = random.dirichlet([1.0] * len(self.last) + [UNKNOWN]).cumsum()
        self.agree = random.random()
        self.power = skill(random) if rest.learns else 1.0

    def __call__(self, parameter_set: int, rung: int) -> float:
        """The parameter set's value at the rung, higher is better."""
        drawn, place = self.random.random(), self.random.random()
        if rung == 0:
            i = int(self.bounds.searchsorted(drawn))
            learned = self.power if parameter_set >= STARTUP else 1.0
            place = self.last[i] if i < len(self.last) else place**learned
        else:
            others, mine = self.before[rung], -self.reached[parameter_set]
            if drawn < self.agree:
                place = (bisect_left(others, mine) + place) / (len(others) + 1)
            insort(others, mine)
        found = -_value_at(self.halving.ranking[rung], place, self.random.random())
        self.reached[parameter_set] = found
        return found


def _value_at(ranking: Sequence[Entry], place: float, part: float) -> float:
    """A value at this place (0 to 1) of an ascending ranking, in the gap there or beyond the ends."""
    if not ranking:
        return 0.0
    i = min(int(place * (len(ranking) + 1)), len(ranking))
    low = ranking[i - 1][0] if i else ranking[0][0] - 1
    high = ranking[i][0] if i < len(ranking) else ranking[-1][0] + 1
    return low + part * (high - low)


def elapsed(trial: FrozenTrial, now: datetime) -> float:
    """Seconds since a trial has started; 0 where that is not known."""
    return max(0.0, (now - trial.datetime_start).total_seconds()) if trial.datetime_start else 0.0
