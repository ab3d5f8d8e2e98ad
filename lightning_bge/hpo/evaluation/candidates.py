"""The parameter sets of a study on resamples of their validation rows: what selects them, and what unseen rows say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from lightning_bge.hpo.evaluation.decision_counts import Counts, Decider, count_decisions, cross_fitted, sum_of
from lightning_bge.hpo.evaluation.resampled_metrics import resampled_metric
from lightning_bge.hpo.evaluation.resampling import Resamples, ValidationRows, mean_of_known
from lightning_bge.hpo.steps import Steps
from lightning_bge.models.metrics.names import DECISION_METRICS, LOWER_IS_BETTER
from lightning_bge.types import Task

MAX_CELLS = 2**20  # outputs x thresholds x resamples that are counted at once: some MiB for each validation of a trial


@dataclass(frozen=True)
class Target:
    """What a study compares its trials by.

    Attributes:
        task: binary, multiclass, multilabel or regression.
        metric: one of the task's, but not `loss`.
        tuned: whether yes/no decisions are made at a tuned threshold, else at 0.5.
        objective: whether a fold's score is that of its `best` or of its `last` epoch.
    """

    task: Task
    metric: str
    tuned: bool = False
    objective: Literal["best", "last"] = "best"

    @property
    def sign(self) -> float:
        """1 where a higher value is better, else -1."""
        return -1.0 if self.metric in LOWER_IS_BETTER else 1.0


@dataclass(frozen=True)
class Validation:
    """A model's outputs for the validation rows of one fold.

    Attributes:
        step: of the trial, from 1.
        logits: float [rows of the fold, outputs].
    """

    step: int
    logits: np.ndarray


@dataclass(frozen=True)
class Candidate:
    """A parameter set that a study has validated.

    Attributes:
        number: of the parameter set.
        last_step: the last one that it has reported.
        load: reads its validations, in the order of their steps.
    """

    number: int
    last_step: int
    load: Callable[[], Sequence[Validation]]


@dataclass(frozen=True)
class ResampledScores:
    """A parameter set at each stage of a study, on B resamples.

    Attributes:
        in_bag: float [stages, B], what it is compared by: on the rows that were drawn.
        out_of_bag: float [stages, B], on the rows that were not drawn, with the epochs and the threshold that are best
            on those that were. NaN at stages that it has not reached.
    """

    in_bag: np.ndarray
    out_of_bag: np.ndarray


@dataclass
class _Fold:
    """The validations of one fold: their steps, and what each gives on each resample."""

    steps: list[int] = field(default_factory=list)
    compared: list[np.ndarray] = field(default_factory=list)
    inside: list[Counts] = field(default_factory=list)
    outside: list[Counts] = field(default_factory=list)
    unseen: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class _Scored:
    """A fold's scored epoch on each resample: what it is compared by, and its counts or its out-of-bag value."""

    compared: np.ndarray
    inside: Counts | None = None
    outside: Counts | None = None
    unseen: np.ndarray | None = None


@dataclass(frozen=True)
class CandidateScorer:
    """Scores parameter sets on resamples.

    Args:
        target: what they are compared by.
        rows: that they were validated on.
        resamples: of these rows.
        steps: of a trial that runs to its end.
        stages: ascending steps at which they are compared; the last is the end of a trial.
    """

    target: Target
    rows: ValidationRows
    resamples: Resamples
    steps: Steps
    stages: Sequence[int]

    def score(self, candidate: Candidate) -> ResampledScores:
        """Score one parameter set at all stages that it has reached, on so many resamples at once as memory allows."""
        validations = candidate.load()
        decider = self._decider(validations)
        width = validations[0].logits.shape[1] * (1 if decider is None else len(decider.thresholds))
        parts = [
            replace(self, resamples=part)._score(candidate, validations, decider)
            for part in self.resamples.split(max(1, MAX_CELLS // width))
        ]
        return ResampledScores(
            np.concatenate([part.in_bag for part in parts], axis=1),
            np.concatenate([part.out_of_bag for part in parts], axis=1),
        )

    def _score(
        self, candidate: Candidate, validations: Sequence[Validation], decider: Decider | None
    ) -> ResampledScores:
        shape = (len(self.stages), self.resamples.in_bag.shape[1])
        found = ResampledScores(np.full(shape, np.nan), np.full(shape, np.nan))
        done: list[_Scored] = []
        for number in range(self.steps.folds):
            mine = [one for one in validations if self._fold_of(one) == number]
            if not mine:
                break
            fold = self._fold(number, mine, decider, [one.inside for one in done if one.inside is not None])
            end = (number + 1) * self.steps.per_fold
            for place, stage in enumerate(self.stages):
                if end - self.steps.per_fold < stage <= min(end, candidate.last_step):
                    scored = [*done, self._scored(fold, stage)]
                    found.in_bag[place] = mean_of_known(np.array([one.compared for one in scored]))
                    found.out_of_bag[place] = self._out_of_bag(scored)
            if candidate.last_step < end:
                break
            done.append(self._scored(fold, end))
        return found

    def _fold_of(self, validation: Validation) -> int:
        return (validation.step - 1) // self.steps.per_fold

    def _decider(self, validations: Sequence[Validation]) -> Decider | None:
        """One for all validations of a parameter set, so that their counts can be added."""
        task = self.target.task
        if self.target.metric not in DECISION_METRICS:
            return None
        if not self.target.tuned:
            return Decider.fixed(task)
        labels = np.concatenate([self.rows.labels[self.rows.of_fold[self._fold_of(one)]] for one in validations])
        return Decider.candidates(task, np.concatenate([one.logits for one in validations]), labels)

    def _fold(
        self, number: int, validations: Sequence[Validation], decider: Decider | None, earlier: Sequence[Counts]
    ) -> _Fold:
        """Score the validations of a fold; `earlier`: the counts of the folds before, on which thresholds are tuned."""
        target, rows, found = self.target, self.rows.of_fold[number], _Fold([one.step for one in validations])
        labels = self.rows.labels[rows]
        inside, outside = self.resamples.in_bag[rows], self.resamples.out_of_bag[rows]
        groups = None if self.rows.groups is None else self.rows.groups[rows]
        tuned = sum_of(earlier).best(target.metric, target.task) if earlier else np.zeros(inside.shape[1], np.int64)
        for one in validations:
            if decider is None:
                for values, weights in ((found.compared, inside), (found.unseen, outside)):
                    args = (target.task, target.metric, one.logits, labels, weights, groups)
                    values.append(resampled_metric(*args))
                continue
            parts = self.rows.parts[rows] if decider.tuned and not earlier else None
            counts = count_decisions(decider, one.logits, labels, inside, parts)
            found.inside.append(sum_of(counts))
            found.outside += count_decisions(decider, one.logits, labels, outside)
            found.compared.append(
                found.inside[-1].at(tuned).metric(target.metric, target.task)[0]
                if parts is None
                else cross_fitted(counts, target.metric, target.task)
            )
        return found

    def _scored(self, fold: _Fold, stage: int) -> _Scored:
        """The scored epoch of each resample, at a step of the fold."""
        places = self._places(fold.steps, stage)
        values = np.stack([fold.compared[place] for place in places])
        best = self._chosen(values)
        compared = np.take_along_axis(values, best[None], axis=0)[0]
        if fold.unseen:
            unseen = np.stack([fold.unseen[place] for place in places])
            return _Scored(compared, unseen=np.take_along_axis(unseen, best[None], axis=0)[0])
        inside, outside = (
            sum_of([counts[place].of(best == number) for number, place in enumerate(places)])
            for counts in (fold.inside, fold.outside)
        )
        return _Scored(compared, inside, outside)

    def _out_of_bag(self, folds: Sequence[_Scored]) -> np.ndarray:
        """The value on the rows that were not drawn: each fold's decided at the threshold of the other folds."""
        if folds[0].unseen is not None:
            return mean_of_known(np.array([one.unseen for one in folds]))
        inside = [one.inside for one in folds if one.inside is not None]
        outside = [one.outside for one in folds if one.outside is not None]
        total, decided = sum_of(inside), []
        for mine, unseen in zip(inside, outside, strict=True):
            others = total if len(folds) == 1 else total - mine
            decided.append(unseen.at(others.best(self.target.metric, self.target.task)))
        found: np.ndarray = sum_of(decided).metric(self.target.metric, self.target.task)[0]
        return found

    def _places(self, steps: Sequence[int], stage: int) -> list[int]:
        """The validations that count for the value at a step: whole epochs until then, and the one made at that step.

        Where an epoch has fewer batches than parts, one validation counts for several steps, the last of which it has.
        """
        places = [place for place, step in enumerate(steps) if step <= stage and step % self.steps.per_epoch == 0]
        now = next((place for place, step in enumerate(steps) if step >= stage), None)
        return places if now is None or now in places else [*places, now]

    def _chosen(self, values: np.ndarray) -> np.ndarray:
        """The place of the scored epoch on each resample, [B]."""
        if self.target.objective == "last":
            return np.full(values.shape[1], len(values) - 1)
        comparable = np.where(np.isfinite(values), self.target.sign * values, -np.inf)
        chosen: np.ndarray = comparable.argmax(axis=0)
        return chosen
