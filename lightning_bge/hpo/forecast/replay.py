"""What any pruner would have made of a recorded search, in milliseconds.

A replay runs the trials of a recording in any order through a pruner: what a trial would report is known, so that no
model is trained, and the search takes the sum of the recorded seconds of the steps that were made. This holds for
what does not choose a trial's hyperparameters by the trials before it: random sampling, but no sampler that learns.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from lightning_bge.hpo.forecast.recording import Recording
from lightning_bge.hpo.pruning.config import PrunerConfig, build_pruner, rungs
from lightning_bge.hpo.pruning.halving import Halving
from lightning_bge.hpo.steps import Steps


@dataclass(frozen=True)
class Replay:
    """A search as it would have been.

    Attributes:
        seconds: that it would have taken.
        found: for each trial that ran to its end, in order: the seconds since the start, and its value.
        steps: how many steps each trial would have made, in the order of the replay.
        order: places in `Recording.trials`, in that order.
    """

    seconds: float
    found: tuple[tuple[float, float], ...]
    steps: tuple[int, ...]
    order: tuple[int, ...]


Policy = Callable[[Recording, Sequence[int], str], Replay]


def policy_of(config: PrunerConfig, n_trials: int, steps: Steps) -> Policy:
    """The policy of a study with such a pruner."""
    if config.name == "asha":
        [at] = rungs(config, steps)
        return lambda recording, order, name: replay_asha(recording, at, config.reduction_factor, order)
    return lambda recording, order, name: replay_pruned(recording, build_pruner(config, n_trials, steps), order, name)


def replay_pruned(recording: Recording, pruner: BasePruner, order: Sequence[int], name: str = "replay") -> Replay:
    """Replay the trials in this order with an Optuna pruner.

    Args:
        recording: what the trials report, and its seconds.
        pruner: the pruner, whose `prune` is called as in a study.
        order: places in `recording.trials`.
        name: of the study; Hyperband draws a trial's bracket from it.
    """
    study = optuna.create_study(
        study_name=name, direction=recording.direction, pruner=pruner, sampler=RandomSampler(seed=0)
    )
    clock, found, steps = 0.0, [], []
    for place in order:
        curve, trial = recording.trials[place], study.ask()
        made = 0
        for made, (value, seconds) in enumerate(zip(curve.values, curve.seconds, strict=True), start=1):
            clock += seconds
            if math.isfinite(value):
                trial.report(value, made)
            if made < recording.n_steps and math.isfinite(value) and trial.should_prune():
                break
        steps.append(made)
        if made == recording.n_steps and curve.value is not None:
            study.tell(trial, curve.value)
            found.append((clock, curve.value))
        else:
            study.tell(trial, state=TrialState.PRUNED)
    return Replay(clock, tuple(found), tuple(steps), tuple(order))


def replay_asha(recording: Recording, steps: Sequence[int], reduction_factor: int, order: Sequence[int]) -> Replay:
    """Replay the trials in this order with asynchronous successive halving, on one worker.

    Args:
        recording: what the trials report, and its seconds.
        steps: the rungs' steps, ascending.
        reduction_factor: of the trials that reach a rung, one in this many trains on.
        order: places in `recording.trials`.
    """
    halving = Halving(len(steps), reduction_factor)
    ends = [*steps, recording.n_steps]
    clock, started = 0.0, 0
    found: list[tuple[float, float]] = []
    made = [0] * len(order)
    while True:
        number, stage = halving.next_resumed(nothing_else=started == len(order)), 0
        if number is not None:
            stage = halving.resume(number) + 1
        elif started < len(order):
            number, started = started, started + 1
        else:
            return Replay(clock, tuple(found), tuple(made), tuple(order))
        curve, end = recording.trials[order[number]], ends[stage]
        clock += math.fsum(curve.seconds[made[number] : end])
        made[number] = min(end, len(curve.values))
        if stage == len(steps):
            if curve.value is not None:
                halving.complete()
                found.append((clock, curve.value))
        elif curve.value is not None or len(curve.values) > end:  # else a NaN has ended it, which is not reported
            halving.add(number, stage, recording.sign * curve.values[end - 1], paused=True)
