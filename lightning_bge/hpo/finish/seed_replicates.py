"""The best trials trained with other seeds as well, so that the winner is not merely the luckiest.

Seed replicates are a study of their own beside the first, in the same journal. Each of their trials carries the number
of the trial that it replicates (`replicate_of`) and its `seed`. What is missing follows from the two studies alone, so
that any process may continue at any time.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.config import BEST, SEED_REPLICATES
from lightning_bge.hpo.finish.end_queue import EndQueue
from lightning_bge.hpo.progress import Progress
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.ranking import best_parameter_sets, ranked, score_of, sign_of
from lightning_bge.hpo.scheduling.study_queue import StudyQueue
from lightning_bge.hpo.scheduling.trial_loop import run_trials
from lightning_bge.hpo.scheduling.trial_queue import Tries
from lightning_bge.hpo.trial.objective import Objective
from lightning_bge.hpo.trials import is_to_be_continued
from lightning_bge.runtime.stop import StopRequest

FOLDER = "seed_replicates"  # of their checkpoints and predictions, beside those of the study
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
        complete: number of a replicated trial all of whose seed replicates have a score -> these trials.
    """

    seeds: tuple[int, ...]
    trials: tuple[ReplicatedTrial, ...]
    before: int
    winner: int
    missing: int
    complete: Mapping[int, Sequence[FrozenTrial]] = field(default_factory=dict)

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
    studies: StudyQueue,
    objective: Objective,
    *,
    metric: str,
    seed: int,
    until: float,
    request: StopRequest,
) -> SeedReplicates | None:
    """Run the seed replicates that are missing; several processes may do so at once on one folder.

    Each of the best trials is trained with the seeds `seed + 1`, `seed + 2`, ... on the same folds, to its end. A seed
    replicate whose process died is continued.

    Args:
        studies: of the study whose best trials are replicated.
        objective: of that study.
        metric: its name.
        seed: the study's `seed_everything`.
        until: `time.monotonic()` after which none begins.
        request: whether to stop.

    Returns:
        None where none are requested, trials of the study are missing, or none has ended with a score.

    Raises:
        MemoryKeptError: as in `run_trials`.
    """
    config, study = studies.config, studies.study
    seeds = tuple(range(seed + 1, seed + 1 + config.n_seed_replicates))
    if not seeds or not studies.is_finished() or not ranked(study):
        return None
    queue = SeedReplicateQueue(studies, seeds)
    train = replace(objective, files=objective.files.within(FOLDER), cost=None, n_trials=len(queue.tasks()))
    progress = objective.tracking.reporting(_Progress(queue, metric, objective.steps.total))
    run_trials(queue, train, until=until, request=request, report=progress)
    return queue.result()


class SeedReplicateQueue(EndQueue):
    """The seed replicates of a study that are missing.

    Args:
        studies: of the study whose best trials are replicated.
        seeds: the further ones.
    """

    def __init__(self, studies: StudyQueue, seeds: Sequence[int]) -> None:
        super().__init__(studies, SEED_REPLICATES, FOLDER)
        self.replicated, self.seeds = studies.study, tuple(seeds)

    def best(self) -> list[FrozenTrial]:
        """The replicated trials; other processes may still end trials of the study, and so change which they are."""
        return best_parameter_sets(self.replicated, BEST)

    def tasks(self) -> list[Task]:
        """All seed replicates, seed by seed: the encoder is read once for each seed."""
        best = self.best()
        return [(trial.number, seed) for seed in self.seeds for trial in best]

    def begin(self, tries: Tries) -> optuna.Trial | None:
        """Continue a lost one that is still needed, else begin the first that is missing."""
        found, best = _by_task(tries), {trial.number: trial for trial in self.best()}
        for number, seed in self.tasks():
            made = found.get((number, seed))
            if made is None:
                return self.start(best[number], {"replicate_of": number, "seed": seed})
            if is_to_be_continued(made):
                return self.retry(made[-1])
        return None

    def complete(self) -> dict[int, list[FrozenTrial]]:
        """The seed replicates of each replicated trial all of whose replicates have a score, by its number."""
        found, tasks = _by_task(self.tries()), self.tasks()
        last = {task: made[-1] for task, made in found.items() if made[-1].state == TrialState.COMPLETE}
        numbers = {number for number, _ in tasks}
        mine = {number: [task for task in tasks if task[0] == number] for number in numbers}
        return {number: [last[task] for task in each] for number, each in mine.items() if all(t in last for t in each)}

    def result(self) -> SeedReplicates:
        """What is known by now."""
        found, best, values = _by_task(self.tries()), self.best(), {}
        for task in self.tasks():
            made = found.get(task)
            if made is not None and not is_to_be_continued(made) and made[-1].state.is_finished():
                values[task] = score_of(made[-1]) if made[-1].state == TrialState.COMPLETE else None
        trials = tuple(
            ReplicatedTrial(trial.number, (score_of(trial), *(values.get((trial.number, seed)) for seed in self.seeds)))
            for trial in best
        )
        missing = len(self.tasks()) - len(values)
        before, sign = ranked(self.replicated)[0].number, sign_of(self.replicated)
        # of equal means the one with the better score in the study
        means = {one.trial: sign * one.mean for one in trials if one.mean is not None}
        winner = before if missing or not means else max(means, key=lambda number: means[number])
        return SeedReplicates(self.seeds, trials, before, winner, missing, self.complete())


def _by_task(tries: Tries) -> dict[Task, list[FrozenTrial]]:
    """The attempts at each seed replicate, the oldest first."""
    return {
        (made[0].user_attrs["replicate_of"], made[0].user_attrs["seed"]): made
        for made in tries.by_set.values()
        if "replicate_of" in made[0].user_attrs
    }


class _Progress(Progress):
    def __init__(self, queue: SeedReplicateQueue, metric: str, n_reports: int) -> None:
        # no replicate is pruned, and the time left is that of the replicates alone
        rest: dict[str, Any] = {"pruner": PrunerConfig("none"), "cost": None, "seed_replicates": 0, "refit": False}
        rest["baseline"] = False
        super().__init__(replace(queue.config, n_trials=len(queue.tasks()), **rest), metric, n_reports)
        self.queue = queue

    def _done(self, study: optuna.Study) -> int:
        return self.n_trials - self.queue.result().missing

    def _name(self, trial: FrozenTrial) -> str:
        return f"trial {trial.user_attrs['replicate_of']} with seed {trial.user_attrs['seed']}"

    def _best(self, study: optuna.Study, trial: FrozenTrial) -> str:
        replicated = self.queue.replicated.get_trials(deepcopy=False)[trial.user_attrs["replicate_of"]]
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
