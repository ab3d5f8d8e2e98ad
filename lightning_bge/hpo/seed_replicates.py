"""The best trials once more, with other seeds: so that the winner is not merely the luckiest.

They are a study of their own beside the search, in the same journal, whose trials carry what they replicate:
`replicate_of` (the trial's number) and `seed`. What is to be done follows from the two studies alone, so that any
process may go on with it at any time: a seed replicate that nobody has queued is queued, and of two of the same the
younger gives way.
"""

from __future__ import annotations

import logging
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.config import BEST, FINISHED, StudyConfig
from lightning_bge.hpo.objective import Objective, predictions_file
from lightning_bge.hpo.progress import Progress, count
from lightning_bge.hpo.ranking import best_points, maximizes, ranked, score_of
from lightning_bge.hpo.storage import sweep
from lightning_bge.hpo.study import is_finished, stop_if_memory_is_kept

ATTEMPTS = 3  # of one seed replicate, whose process died or which failed; then it counts as one without a value
log = logging.getLogger("lightning_bge")

Task = tuple[int, int]  # the trial's number, and the seed


@dataclass(frozen=True)
class ReplicatedTrial:
    """One of the best trials, and how it did with all seeds.

    Attributes:
        trial: its number in the search.
        values: its score in the search, then one for each further seed; None: not run yet, or ended without a value.
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
    """How the best trials did with other seeds, and which one is the winner.

    Attributes:
        seeds: the further ones.
        trials: the best of the search, in its order.
        before: the search's best trial.
        winner: the trial with the best mean over its seeds. A trial with a seed replicate that ended without a value
            (NaN, out of memory, or its process died each time) is none. `before`, where nothing else can be said or
            `missing`.
        missing: seed replicates that have not ended.
        elsewhere: those of them that other processes are running now.
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
                {"trial": again.trial, "values": list(again.values), "mean": again.mean, "spread": again.spread}
                for again in self.trials
            ],
        }


def run_seed_replicates(
    study: optuna.Study,
    objective: Objective,
    config: StudyConfig,
    metric: str,
    n_reports: int,
    seed: int,
    since: float,
) -> SeedReplicates | None:
    """Run the best trials again, or what is missing of that; several processes may do so at once on one folder.

    Each is run with the seeds `seed + 1`, `seed + 2`, ... on the same folds, to its end. A seed replicate whose
    process died is run again. Trials whose out-of-fold predictions are not there are left out, as they could not be the
    winner: those of a study that an older version ran.

    Args:
        study: the search.
        objective: the search's.
        config: of the search: n_trials, seed_replicates, timeout.
        metric: its name.
        n_reports: reports of a trial that runs to its end.
        seed: the search's `seed_everything`.
        since: `time.monotonic()` at the start of this call, for `config.timeout`.

    Returns:
        None where none are asked for, the search has not all its trials yet, or there is none to be run again.

    Raises:
        MemoryKeptError: as in `run_study`.
    """
    seeds = tuple(range(seed + 1, seed + 1 + config.n_seed_replicates))
    if not seeds or not is_finished(study, config) or not ranked(study):
        return None
    plan = _Plan(study, _open(study), objective, seeds)
    repeated = plan.best()
    if left_out := [trial.number for trial in best_points(study, BEST) if trial not in repeated]:
        log.warning("not run again, as an older version kept no predictions of them: trials %s", left_out)
    if not repeated:
        return None
    progress = _Progress(plan, metric, n_reports)
    once = plan.objective()
    until = math.inf if config.timeout is None else since + config.timeout
    while plan.queue() and time.monotonic() < until:
        plan.again.optimize(once, n_trials=1, callbacks=[progress, stop_if_memory_is_kept])
    return plan.result()


def _open(study: optuna.Study) -> optuna.Study:
    return optuna.create_study(
        storage=study._storage,
        study_name=f"{study.study_name}-seed-replicates",
        direction=study.directions[0],
        sampler=optuna.samplers.RandomSampler(),  # never asked: all parameters are given
        pruner=optuna.pruners.NopPruner(),
        load_if_exists=True,
    )


@dataclass(frozen=True)
class _Plan:
    study: optuna.Study
    again: optuna.Study
    trained: Objective
    seeds: tuple[int, ...]

    def best(self) -> list[FrozenTrial]:
        """Which trials are repeated: other processes may still end trials of the search, and so change it."""
        oof_dir = self.trained.oof_dir
        assert oof_dir is not None
        best = best_points(self.study, BEST)
        return [trial for trial in best if predictions_file(oof_dir, trial.number).is_file()]

    def tasks(self) -> list[Task]:
        """All seed replicates, seed by seed: the model is read anew for each seed."""
        best = self.best()
        return [(trial.number, seed) for seed in self.seeds for trial in best]

    def queue(self) -> bool:
        """Queue what is missing and nobody has; return whether anything waits to be run."""
        # A seed replicate is given up by the number of its failures, not by that of its retries, which include Ctrl-C.
        sweep(self.again, max_retries=sys.maxsize)
        attempts = self.attempts()
        params = {trial.number: trial.params for trial in self.best()}
        for of, seed in self.tasks():
            tried = attempts.get((of, seed), [])
            if not any(_holds(trial) for trial in tried) and not _given_up(tried):
                self.again.enqueue_trial(params[of], user_attrs={"replicate_of": of, "seed": seed})
        return count(self.again, TrialState.WAITING) > 0

    def attempts(self) -> dict[Task, list[FrozenTrial]]:
        """All trials that were made of each seed replicate, the oldest first."""
        found: dict[Task, list[FrozenTrial]] = {}
        for trial in self.again.get_trials(deepcopy=False):
            if (task := _task(trial)) is not None:
                found.setdefault(task, []).append(trial)
        return found

    def objective(self) -> Any:
        """What a trial of the seed replicates does: train, unless there is nothing to do."""
        inner = replace(self.trained, oof_dir=None, cost=None, n_trials=len(self.tasks()))

        def once(trial: optuna.Trial) -> Any:
            if not self.redundant(trial):
                return inner(trial)
            trial.set_user_attr("redundant", True)
            return math.nan  # Optuna ends it as FAIL

        return once

    def redundant(self, trial: optuna.Trial) -> bool:
        """Whether another process was faster, or the trial that this one replicates is no longer among the best."""
        task = _task(trial)
        if task is None or task not in self.tasks():  # None: the queue was empty, and Optuna has made a new trial
            return True
        tried = self.attempts()[task]
        return _given_up(tried) or any(_holds(other) for other in tried if other.number < trial.number)

    def result(self) -> SeedReplicates:
        """What is known by now."""
        attempts = self.attempts()
        tasks = self.tasks()
        missing = [task for task in tasks if not _ended(attempts.get(task, []))]
        running = [task for task in missing if any(t.state == TrialState.RUNNING for t in attempts.get(task, []))]
        trials = tuple(
            ReplicatedTrial(
                trial.number, (score_of(trial), *(_value(attempts.get((trial.number, k), [])) for k in self.seeds))
            )
            for trial in self.best()
        )
        before = ranked(self.study)[0].number
        sign = 1 if maximizes(self.study) else -1
        # of equal ones the search's better one
        means = {again.trial: sign * again.mean for again in trials if again.mean is not None}
        winner = before if missing or not means else max(means, key=lambda number: means[number])
        return SeedReplicates(self.seeds, trials, before, winner, len(missing), len(running))

    def ended(self) -> int:
        """Number of seed replicates that are done with."""
        attempts = self.attempts()
        return sum(_ended(attempts.get(task, [])) for task in self.tasks())


def _task(trial: FrozenTrial | optuna.Trial) -> Task | None:
    attributes = trial.user_attrs
    return (attributes["replicate_of"], attributes["seed"]) if "replicate_of" in attributes else None


def _holds(trial: FrozenTrial) -> bool:
    """Whether it has done its seed replicate, is doing it, or will do it."""
    return trial.state != TrialState.FAIL


def _given_up(tried: Sequence[FrozenTrial]) -> bool:
    failed = [trial for trial in tried if trial.state == TrialState.FAIL and "redundant" not in trial.user_attrs]
    return sum(not str(trial.user_attrs.get("swept", "")).startswith("interrupted") for trial in failed) >= ATTEMPTS


def _ended(tried: Sequence[FrozenTrial]) -> bool:
    return _given_up(tried) or any(trial.state in FINISHED for trial in tried)


def _value(tried: Sequence[FrozenTrial]) -> float | None:
    return next((score_of(trial) for trial in tried if trial.state == TrialState.COMPLETE), None)


class _Progress(Progress):
    def __init__(self, plan: _Plan, metric: str, n_reports: int) -> None:
        super().__init__(len(plan.tasks()), metric, n_reports)
        self.plan = plan

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Optuna calls this after each trial."""
        if "redundant" not in trial.user_attrs:
            super().__call__(study, trial)

    def _done(self, study: optuna.Study) -> int:
        return self.plan.ended()

    def _name(self, trial: FrozenTrial) -> str:
        return f"trial {trial.user_attrs['replicate_of']} again, seed {trial.user_attrs['seed']},"

    def _best(self, study: optuna.Study, trial: FrozenTrial) -> str:
        old = next(
            one for one in self.plan.study.get_trials(deepcopy=False) if one.number == trial.user_attrs["replicate_of"]
        )
        return f"{score_of(old):.4f} with the search's seed"


def describe_seed_replicates(found: dict[str, Any], metric: str) -> list[str]:
    """Lines for a user, of what `SeedReplicates.as_dict` gave the summary."""
    seeds = len(found["seeds"])
    lines = [
        f"the best {len(found['trials'])} again with {seeds} other seed{'s'[: seeds > 1]} each; "
        f"{metric}, mean +- standard deviation over all {seeds + 1} seeds:"
    ]
    for again in found["trials"]:
        mark = " <- the winner" if again["trial"] == found["winner"] else ""
        if again["mean"] is None:
            shown = "not every seed has a value"
        else:
            shown = f"{again['mean']:.4f} +- {again['spread']:.4f}"
        lines.append(f"  trial {again['trial']}: {shown} (in the search {again['values'][0]:.4f}){mark}")
    if found["missing"]:
        return [*lines, f"{found['missing']} of them are missing, and may change the winner: the same command goes on"]
    if found["winner"] == found["winner_before"]:
        return [*lines, "the search's best trial stays the winner"]
    return [*lines, f"the winner changed: trial {found['winner']}, not trial {found['winner_before']} as in the search"]
