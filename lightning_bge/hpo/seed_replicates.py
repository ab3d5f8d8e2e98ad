"""The best trials trained with other seeds as well, so that the winner is not merely the luckiest.

Seed replicates are a study of their own beside the first, in the same journal. Each of their trials carries the number
of the trial that it replicates (`replicate_of`) and its `seed`. What is missing follows from the two studies alone, so
that any process may continue at any time: it queues what nobody has queued, and of two equal trials it skips the later.
"""

import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.config import BEST, FINISHED, SEED_REPLICATES, StudyConfig
from lightning_bge.hpo.progress import Progress, count
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.ranking import best_parameter_sets, ranked, score_of, sign_of
from lightning_bge.hpo.storage.workers import sweep
from lightning_bge.hpo.study import is_finished, stop_if_memory_is_kept
from lightning_bge.hpo.trial.objective import Objective
from lightning_bge.runtime.compat.optuna import storage_of

ATTEMPTS = 3  # at one seed replicate, whose process dies or which fails; then it counts as one without a value

TAKEN = (*FINISHED, TrialState.RUNNING, TrialState.WAITING)  # of a trial that has run, runs or will run
Task = tuple[int, int]  # the replicated trial's number, and the seed


@dataclass(frozen=True)
class ReplicatedTrial:
    """One of the best trials, with the scores of its seed replicates.

    Attributes:
        trial: its number in the study.
        values: its score in the study, then one for each further seed; None: not run yet, or ended without a value.
    """

    trial: int
    values: tuple[float | None, ...]

    @property
    def mean(self) -> float | None:
        """Over all seeds; None where a value is missing."""
        found = [value for value in self.values if value is not None]
        return statistics.fmean(found) if len(found) == len(self.values) else None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None where a value is missing."""
        found = [value for value in self.values if value is not None]
        return statistics.stdev(found) if len(found) == len(self.values) > 1 else None


@dataclass(frozen=True)
class SeedReplicates:
    """The scores of the best trials with several seeds, and the winner.

    Attributes:
        seeds: the further ones.
        trials: the best of the study, in its order.
        before: the study's best trial.
        winner: the trial with the best mean over its seeds. A trial with a seed replicate that ended without a value
            (NaN, out of memory, or its process died each time) can't be it. `before`, where no trial can, or while
            some are `missing`.
        missing: number of seed replicates that have not ended.
        elsewhere: how many of these other processes are running now.
    """

    seeds: tuple[int, ...]
    trials: tuple[ReplicatedTrial, ...]
    before: int
    winner: int
    missing: int
    elsewhere: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the summary."""
        return {
            "seeds": list(self.seeds),
            "winner_before": self.before,
            "winner": self.winner,
            "missing": self.missing,
            "trials": [
                {"trial": one.trial, "values": list(one.values), "mean": one.mean, "spread": one.spread}
                for one in self.trials
            ],
        }


def run_seed_replicates(
    study: optuna.Study, objective: Objective, config: StudyConfig, *, metric: str, seed: int, since: float
) -> SeedReplicates | None:
    """Run the seed replicates that are missing; several processes may do so at once on one folder.

    Each of the best trials is trained with the seeds `seed + 1`, `seed + 2`, ... on the same folds, to its end. A seed
    replicate whose process died is run once more.

    Args:
        study: the study whose best trials are replicated.
        objective: of that study.
        config: options of that study: n_trials, seed_replicates, timeout.
        metric: its name.
        seed: the study's `seed_everything`.
        since: `time.monotonic()` at the start of the call that `config.timeout` limits.

    Returns:
        None where none are requested, trials of the study are missing, or none has ended with a score.

    Raises:
        MemoryKeptError: as in `run_study`.
    """
    seeds = tuple(range(seed + 1, seed + 1 + config.n_seed_replicates))
    if not seeds or not is_finished(study, config) or not ranked(study):
        return None
    todo = _Todo(study, _open(study), objective, seeds)
    progress, once = _Progress(todo, config, metric), todo.objective()
    until = math.inf if config.timeout is None else since + config.timeout
    while todo.queue() and time.monotonic() < until:
        todo.replicates.optimize(once, n_trials=1, callbacks=[progress, stop_if_memory_is_kept])
    return todo.result()


def _open(study: optuna.Study) -> optuna.Study:
    return optuna.create_study(
        storage=storage_of(study),
        study_name=f"{study.study_name}{SEED_REPLICATES}",
        direction=study.directions[0],
        sampler=optuna.samplers.RandomSampler(),  # never used: all parameters are given
        pruner=optuna.pruners.NopPruner(),
        load_if_exists=True,
    )


@dataclass(frozen=True)
class _Todo:
    study: optuna.Study
    replicates: optuna.Study
    trained: Objective
    seeds: tuple[int, ...]

    def best(self) -> list[FrozenTrial]:
        """The replicated trials; other processes may still end trials of the study, and so change which they are."""
        return best_parameter_sets(self.study, BEST)

    def tasks(self) -> list[Task]:
        """All seed replicates, seed by seed: the encoder is read once for each seed."""
        best = self.best()
        return [(trial.number, seed) for seed in self.seeds for trial in best]

    def queue(self) -> bool:
        """Queue what is missing and nobody has; return whether any trial is waiting."""
        # given up by the number of failures (`ATTEMPTS`), not by that of retries, which include those after Ctrl-C
        sweep(self.replicates, max_retries=sys.maxsize)
        attempts = self.attempts()
        params = {trial.number: trial.params for trial in self.best()}
        for number, seed in self.tasks():
            if not _settled(attempts[number, seed], TAKEN):
                self.replicates.enqueue_trial(params[number], user_attrs={"replicate_of": number, "seed": seed})
        return count(self.replicates, TrialState.WAITING) > 0

    def attempts(self) -> defaultdict[Task, list[FrozenTrial]]:
        """All trials that were made of each seed replicate, the oldest first."""
        found: defaultdict[Task, list[FrozenTrial]] = defaultdict(list)
        for trial in self.replicates.get_trials(deepcopy=False):
            if (task := _task(trial)) is not None:
                found[task].append(trial)
        return found

    def objective(self) -> Any:
        """Trains a seed replicate, unless it is redundant."""
        files = replace(self.trained.files, out_of_fold=None)
        train = replace(self.trained, files=files, cost=None, n_trials=len(self.tasks()))

        def once(trial: optuna.Trial) -> Any:
            if not self.redundant(trial):
                return train(trial)
            trial.set_user_attr("redundant", True)
            return math.nan  # Optuna ends it as FAIL

        return once

    def redundant(self, trial: optuna.Trial) -> bool:
        """Whether another process was faster, or the replicated trial is no longer among the best."""
        task = _task(trial)
        if task is None or task not in self.tasks():  # None: the queue was empty, and Optuna has made a new trial
            return True
        return _settled([other for other in self.attempts()[task] if other.number < trial.number], TAKEN)

    def result(self) -> SeedReplicates:
        """What is known by now."""
        attempts = self.attempts()
        missing = [attempts[task] for task in self.tasks() if not _settled(attempts[task], FINISHED)]
        running = [tried for tried in missing if any(trial.state == TrialState.RUNNING for trial in tried)]
        trials = tuple(
            ReplicatedTrial(
                trial.number, (score_of(trial), *(_value(attempts[trial.number, seed]) for seed in self.seeds))
            )
            for trial in self.best()
        )
        before, sign = ranked(self.study)[0].number, sign_of(self.study)
        # of equal means the one with the better score in the study
        means = {one.trial: sign * one.mean for one in trials if one.mean is not None}
        winner = before if missing or not means else max(means, key=lambda number: means[number])
        return SeedReplicates(self.seeds, trials, before, winner, len(missing), len(running))


def _task(trial: FrozenTrial | optuna.Trial) -> Task | None:
    attributes = trial.user_attrs
    return (attributes["replicate_of"], attributes["seed"]) if "replicate_of" in attributes else None


def _settled(tried: Sequence[FrozenTrial], states: Sequence[TrialState]) -> bool:
    """Whether one of the trials of a seed replicate is in such a state, or too many of them have failed."""
    failed = [trial for trial in tried if trial.state == TrialState.FAIL and "redundant" not in trial.user_attrs]
    attempts = sum(not str(trial.user_attrs.get("swept", "")).startswith("interrupted") for trial in failed)
    return attempts >= ATTEMPTS or any(trial.state in states for trial in tried)


def _value(tried: Sequence[FrozenTrial]) -> float | None:
    return next((score_of(trial) for trial in tried if trial.state == TrialState.COMPLETE), None)


class _Progress(Progress):
    def __init__(self, todo: _Todo, config: StudyConfig, metric: str) -> None:
        # no replicate is pruned, and the time left is that of the replicates alone
        rest: dict[str, Any] = {"pruner": PrunerConfig("none"), "cost": None, "seed_replicates": 0, "refit": False}
        super().__init__(replace(config, n_trials=len(todo.tasks()), **rest), metric, todo.trained.steps.total)
        self.todo = todo

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Optuna calls this after each trial."""
        if "redundant" not in trial.user_attrs:
            super().__call__(study, trial)

    def _done(self, study: optuna.Study) -> int:
        return self.n_trials - self.todo.result().missing

    def _name(self, trial: FrozenTrial) -> str:
        return f"trial {trial.user_attrs['replicate_of']} with seed {trial.user_attrs['seed']}"

    def _best(self, study: optuna.Study, trial: FrozenTrial) -> str:
        replicated = self.todo.study.get_trials(deepcopy=False)[trial.user_attrs["replicate_of"]]
        return f"{score_of(replicated):.4f} in the study"


def describe_seed_replicates(found: dict[str, Any], metric: str) -> list[str]:
    """Lines for a user about what `SeedReplicates.as_dict` returns."""
    lines = [
        f"seed replicates of the best {len(found['trials'])} trials: {metric}, mean +- standard deviation over "
        f"{len(found['seeds']) + 1} seeds"
    ]
    for one in found["trials"]:
        mark = " <- the winner" if one["trial"] == found["winner"] else ""
        known = one["mean"] is not None
        shown = f"{one['mean']:.4f} +- {one['spread']:.4f}" if known else "not every seed has a value"
        lines.append(f"  trial {one['trial']}: {shown} (in the study {one['values'][0]:.4f}){mark}")
    if found["missing"]:
        return [*lines, f"{found['missing']} of them are missing, and may change the winner: continue the study"]
    if found["winner"] == found["winner_before"]:
        return [*lines, "the winner is the study's best trial"]
    return [*lines, f"the winner is trial {found['winner']}, and not the study's best trial, {found['winner_before']}"]
