"""A study as plain data for reports: its trials, their outcomes, values, learning curves and times."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.ranking import cost_of, maximizes, score_of
from lightning_bge.hpo.steps import Report, Steps
from lightning_bge.hpo.storage.workers import loss_of
from lightning_bge.hpo.trials import (
    ERROR,
    INTERRUPTED,
    NOT_TRAINED,
    PAUSED_AT,
    RESUMES,
    WORKER_LOST,
    parameter_set_of,
    resumed_numbers,
)

# outcomes of a trial with their meaning, in the order in which they are listed
OUTCOMES = {
    "complete": "complete",
    "paused": "paused: stopped at a rung, and may be resumed later",
    "resumed": "resumed: paused, and continued as a later trial",
    "pruned": "pruned: stopped early for good",
    "diverged": "diverged: the metric became NaN or infinite",
    "out of memory": "out of memory: did not fit even in the smallest micro-batches",
    "failed": "failed: ended by an error",
    "interrupted": "interrupted: its process was stopped or died, and a later trial continues it",
    "left out": "left out: not in the present search space, or there already",
    "running": "running",
    "waiting": "waiting to run",
}
ENDED = ("complete", "paused", "resumed", "pruned", "diverged", "out of memory")


@dataclass(frozen=True)
class TrialResult:
    """The result of a complete trial.

    Attributes:
        value: the score.
        cost: in seconds; None where the study minimizes no cost.
        fold_scores: the score of each fold.
    """

    value: float
    cost: float | None = None
    fold_scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class PastTrial:
    """One trial of a study.

    Attributes:
        number: from 0.
        outcome: how it ended, or that it has not ended; one of `OUTCOMES`.
        start: local time; None while it waits.
        end: local time; None while it has not ended, or where its process died and no other has recorded the end.
        result: of a complete trial, else None.
        params: the values of its hyperparameters by their dotted names.
        values: step, from 1 -> the value reported to the pruner: the mean over the folds so far. A trial that resumes
            another one has the values of that one too. Where a cost is minimized nothing is reported: then the values
            of `curve`.
        curve: the validations of each fold; empty before the trial's end.
        resumes: the number of the paused trial that it resumes; None: it resumes none.
        parameter_set: the number of the first trial that has its parameter set; None: this one.
        note: why it was interrupted, has failed or is left out, the value that was not finite, or where memory ran out;
            empty otherwise.
    """

    number: int
    outcome: str
    start: datetime | None = None
    end: datetime | None = None
    result: TrialResult | None = None
    params: dict[str, Any] = field(default_factory=dict)
    values: dict[int, float] = field(default_factory=dict)
    curve: tuple[tuple[Report, ...], ...] = ()
    resumes: int | None = None
    parameter_set: int | None = None
    note: str = ""

    @property
    def value(self) -> float | None:
        """The score of a complete trial, else None."""
        return None if self.result is None else self.result.value

    @property
    def cost(self) -> float | None:
        """The cost of a complete trial in seconds; None where there is none."""
        return None if self.result is None else self.result.cost

    @property
    def fold_scores(self) -> tuple[float, ...]:
        """The score of each fold of a complete trial, else empty."""
        return () if self.result is None else self.result.fold_scores

    @property
    def last_step(self) -> int:
        """The last step that it reported; 0 before the first."""
        return max(self.values, default=0)

    @property
    def curve_seconds(self) -> float:
        """Wall-clock seconds of training and validation in `curve`, those of the trials that it resumes included."""
        return sum(one.train_seconds + one.val_seconds for fold in self.curve for one in fold)


@dataclass(frozen=True)
class StudyGoal:
    """What a study optimizes.

    Attributes:
        metric: the name of the score.
        direction: of the score.
        epoch: the epoch that gives the score of a fold: its `best` or its `last`.
        cost: what is minimized besides; None: nothing.
    """

    metric: str
    direction: Literal["maximize", "minimize"] = "maximize"
    epoch: str = "best"
    cost: str | None = None


@dataclass(frozen=True)
class History:
    """A study.

    Attributes:
        goal: what it optimizes.
        steps: folds, epochs and steps of a complete trial.
        n_trials: how many trials are to be finished; None where the folder's config.yaml does not say.
        pruner: name of the pruner; None where the folder's config.yaml does not say.
        space: the search space: dotted name -> distribution, as plain data (`space_to_json`).
        trials: by their numbers.
        seed_replicates: the runs of the best trials with other seeds.
        read_at: local time at which the journal was read.
    """

    goal: StudyGoal
    steps: Steps
    n_trials: int | None
    pruner: str | None
    space: dict[str, dict[str, Any]]
    trials: tuple[PastTrial, ...]
    seed_replicates: tuple[PastTrial, ...]
    read_at: datetime

    @property
    def counts(self) -> Counter[str]:
        """Number of trials by outcome, in the order of `OUTCOMES`."""
        return Counter(sorted((trial.outcome for trial in self.trials), key=[*OUTCOMES].index))

    @property
    def n_finished(self) -> int:
        """Finished parameter sets, to be compared with `n_trials`: one that was paused and resumed counts once."""
        ended = [trial for trial in self.trials if trial.outcome in ENDED]
        return len({trial.number if trial.parameter_set is None else trial.parameter_set for trial in ended})

    @property
    def is_running(self) -> bool:
        """Whether a trial or a seed replicate is running."""
        return any(trial.outcome == "running" for trial in (*self.trials, *self.seed_replicates))

    @property
    def ranked(self) -> list[PastTrial]:
        """The complete trials, the best score first; of equal scores the lower cost, then the older trial."""
        return sorted((trial for trial in self.trials if trial.result is not None), key=self.rank)

    @property
    def best(self) -> PastTrial | None:
        """The complete trial with the best score."""
        return next(iter(self.ranked), None)

    def rank(self, trial: PastTrial) -> tuple[float, ...]:
        """The key by which complete trials are sorted, the best first."""
        score = trial.value or 0.0
        return -score if self.goal.direction == "maximize" else score, trial.cost or 0.0, trial.number


def history_of(
    study: optuna.Study, seed_replicates: Sequence[FrozenTrial], living: Collection[str], options: Mapping[str, Any]
) -> History:
    """Describe a study as plain data.

    Args:
        study: of `lightning-bge hpo`.
        seed_replicates: the trials of its seed replicates.
        living: the ids of the workers that live.
        options: the section `hpo` of the run's config.yaml; empty where there is none.
    """
    return History(
        goal=_goal(study),
        steps=Steps(**study.user_attrs["steps"]),
        n_trials=options.get("n_trials"),
        pruner=(options.get("pruner") or {}).get("name"),
        space=study.user_attrs["space"],
        trials=_past_trials(study.get_trials(deepcopy=False), living),
        seed_replicates=_past_trials(seed_replicates, living),
        read_at=datetime.now(),
    )


def _goal(study: optuna.Study) -> StudyGoal:
    settings = study.user_attrs["settings"]
    return StudyGoal(
        metric=settings["monitor.metric"],
        direction="maximize" if maximizes(study) else "minimize",
        epoch=settings.get("monitor.objective", "best"),
        cost=settings.get("hpo.cost"),
    )


def _past_trials(trials: Sequence[FrozenTrial], living: Collection[str]) -> tuple[PastTrial, ...]:
    resumed = resumed_numbers(trials)
    return tuple(_past_trial(trial, trial.number in resumed, living) for trial in trials)


def _past_trial(trial: FrozenTrial, resumed: bool, living: Collection[str]) -> PastTrial:
    known = trial.user_attrs
    outcome, note = _outcome(trial, resumed, living)
    score, result = score_of(trial), None
    curve = tuple(tuple(Report(*report) for report in fold) for fold in known.get("curve", ()))
    if trial.state == TrialState.COMPLETE and score is not None:  # of a pruned trial Optuna has its last value here
        result = TrialResult(score, cost_of(trial), tuple(known.get("fold_scores", ())))
    return PastTrial(
        number=trial.number,
        outcome=outcome,
        start=trial.datetime_start,
        end=trial.datetime_complete,
        result=result,
        params=dict(trial.params),
        values=dict(sorted(trial.intermediate_values.items()))
        or {one.step: one.value for fold in curve for one in fold},
        curve=curve,
        resumes=known.get(RESUMES),
        parameter_set=parameter_set_of(trial),
        note=note,
    )


def _outcome(trial: FrozenTrial, resumed: bool, living: Collection[str]) -> tuple[str, str]:
    """The outcome of a trial, and the note on it."""
    known = trial.user_attrs
    if trial.state == TrialState.COMPLETE:
        return "complete", ""
    if trial.state == TrialState.WAITING:
        return "waiting", ""
    if trial.state == TrialState.RUNNING:
        loss = loss_of(trial, living)
        return ("running", "") if loss is None else ("interrupted", loss)
    if trial.state == TrialState.FAIL:
        return _failure(known)
    if "oom_where" in known:
        return "out of memory", f"in {known['oom_where']}"
    if "nan" in known:
        return "diverged", str(known["nan"])
    if PAUSED_AT in known:
        return "resumed" if resumed else "paused", ""
    return "pruned", ""


def _failure(known: Mapping[str, Any]) -> tuple[str, str]:
    if NOT_TRAINED in known:
        return "left out", str(known[NOT_TRAINED])
    if ERROR in known:
        return "failed", str(known[ERROR])
    stopped = known.get(WORKER_LOST, known.get(INTERRUPTED))
    return ("failed", "") if stopped is None else ("interrupted", str(stopped))
