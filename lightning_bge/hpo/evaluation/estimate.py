"""The score of a study's winner on rows that did not choose it, and what the winner is better than.

The bootstrap bias correction of cross-validation, BBC-CV (Tsamardinos et al. 2018, doi:10.1007/s10994-018-5714-4), with
all that a study chooses inside the bootstrap: the epochs, the threshold, who trains on at each stage, and the winner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lightning_bge.hpo.evaluation.candidates import Candidate, CandidateScorer, ResampledScores, Target, Validation
from lightning_bge.hpo.evaluation.resampling import Resamples, ValidationRows
from lightning_bge.hpo.evaluation.selection import select
from lightning_bge.hpo.steps import Steps
from lightning_bge.models.metrics.predictions import constant_logits

N_RESAMPLES = 400  # the error of a mean of so many is a twentieth of their standard deviation
SEED = 0
INTERVAL = (2.5, 97.5)  # per cent


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval.

    Attributes:
        value: the mean over the resamples.
        low: the 2.5th percentile.
        high: the 97.5th.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> Interval | None:
        """Of one value for each resample; those that are NaN do not count. None: all are."""
        known = values[np.isfinite(values)]
        if not len(known):
            return None
        low, high = np.percentile(known, INTERVAL)
        return cls(float(known.mean()), float(low), float(high))

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is larger than what chance explains."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Estimate:
    """What a study may say about its winner.

    Attributes:
        corrected: the winner's score on rows that did not choose it; None: no resample has what the metric needs.
        differences: how much better the winner is than `runner_up`, `configured` (the options without a search) and
            `majority` (the best constant prediction), on the same rows; above 0 is better, whatever the metric.
        n_parameter_sets: that were in the selection.
        n_rows: that were resampled.
        n_groups: that were resampled as a whole; None: rows are independent.
    """

    corrected: Interval | None
    differences: dict[str, Interval]
    n_parameter_sets: int
    n_rows: int
    n_groups: int | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the summary."""
        return {
            "corrected": None if self.corrected is None else vars(self.corrected),
            "differences": {
                name: {**vars(found), "excludes_zero": found.excludes_zero} for name, found in self.differences.items()
            },
            "n_resamples": N_RESAMPLES,
            "n_parameter_sets": self.n_parameter_sets,
            "n_rows": self.n_rows,
            "n_groups": self.n_groups,
        }


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What a study has selected from.

    Attributes:
        target: what its trials are compared by.
        rows: that they were validated on.
        steps: of a trial that runs to its end.
        candidates: its parameter sets; at least one has reached the last step.
        replicates: number of a parameter set -> its seed replicates, all of which have reached the last step. Where
            there are any, the winner is one of these, with the best mean over the seeds.
        configured: the options without a search, with their own steps; None: they were not trained.
    """

    target: Target
    rows: ValidationRows
    steps: Steps
    candidates: Sequence[Candidate]
    replicates: dict[int, Sequence[Candidate]]
    configured: tuple[Candidate, Steps] | None = None


def estimate(contest: Contest, n_resamples: int = N_RESAMPLES, seed: int = SEED) -> Estimate:
    """Repeat the selection of a study on resamples of its rows, and score each winner on the rows that were not drawn.

    What this does not correct: a sampler that learns has chosen later parameter sets by the scores of earlier ones.

    Args:
        contest: what the study has selected from.
        n_resamples: B.
        seed: of the resamples.
    """
    rows, target = contest.rows, contest.target
    resamples = Resamples.draw(rows, n_resamples, seed)
    stages = sorted({one.last_step for one in contest.candidates} | {contest.steps.total})
    scorer = CandidateScorer(target, rows, resamples, contest.steps, stages)
    n_stages = len(stages) + bool(contest.replicates)
    shape = (len(contest.candidates), n_stages, n_resamples)
    in_bag, out_of_bag = np.full(shape, np.nan), np.full(shape, np.nan)
    last_stage = np.array([stages.index(one.last_step) for one in contest.candidates])
    final = replace(scorer, stages=stages[-1:])
    for place, one in enumerate(contest.candidates):
        found = scorer.score(one)
        in_bag[place, : len(stages)], out_of_bag[place, : len(stages)] = found.in_bag, found.out_of_bag
        if one.number in contest.replicates:
            seeds = [found, *(final.score(each) for each in contest.replicates[one.number])]
            in_bag[place, -1], out_of_bag[place, -1] = _over_seeds(seeds, seed + place)
            last_stage[place] += 1
    chosen = select(in_bag, out_of_bag, last_stage, target.sign)
    outputs = contest.candidates[0].load()[0].logits.shape[1]
    against = {"runner_up": chosen.runner_up, "majority": _majority(scorer, outputs)}
    if contest.configured is not None:
        candidate, steps = contest.configured
        alone = replace(scorer, steps=steps, stages=[steps.total]).score(candidate)
        against["configured"] = alone.out_of_bag[-1]
    intervals = {name: Interval.of(target.sign * (chosen.winner - other)) for name, other in against.items()}
    return Estimate(
        corrected=Interval.of(chosen.winner),
        differences={name: found for name, found in intervals.items() if found is not None},
        n_parameter_sets=len(contest.candidates),
        n_rows=len(rows.fold),
        n_groups=None if rows.groups is None else len(np.unique(rows.groups)),
    )


def _over_seeds(seeds: Sequence[ResampledScores], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """In-bag means over the seeds, and out-of-bag means over seeds drawn with replacement: their variance counts."""
    in_bag = np.stack([one.in_bag[-1] for one in seeds])
    out_of_bag = np.stack([one.out_of_bag[-1] for one in seeds])
    drawn = np.random.default_rng(seed).integers(len(seeds), size=out_of_bag.shape)
    return in_bag.mean(0), np.take_along_axis(out_of_bag, drawn, axis=0).mean(0)


def _majority(scorer: CandidateScorer, outputs: int) -> np.ndarray:
    """Out-of-bag values of the constant prediction that is best in-bag, [B]: one class, yes, no, or the mean."""
    rows, target = scorer.rows, scorer.target
    constants = constant_logits(target.task, outputs, float(rows.labels.mean())).numpy()
    steps = Steps(len(rows.of_fold), 1)
    alone = replace(scorer, steps=steps, stages=[steps.total], target=replace(target, tuned=False))
    found = []
    for logits in constants:
        each = [
            Validation(fold + 1, np.repeat(logits[None], len(mine), axis=0)) for fold, mine in enumerate(rows.of_fold)
        ]
        found.append(alone.score(Candidate(-1, steps.total, lambda each=each: each)))  # type: ignore[misc]
    in_bag = target.sign * np.stack([one.in_bag[-1] for one in found])
    best = np.where(np.isfinite(in_bag), in_bag, -np.inf).argmax(axis=0)
    return np.take_along_axis(np.stack([one.out_of_bag[-1] for one in found]), best[None], axis=0)[0]
