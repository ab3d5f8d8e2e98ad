"""A study's selection, repeated on resamples of the rows: who trains on at each stage, and who wins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Selection:
    """Who won on each of B resamples, and what the rows say that were not drawn.

    Attributes:
        winner: float [B], the winner's out-of-bag value.
        runner_up: float [B], the out-of-bag value of the second; NaN where a study has one complete parameter set.
    """

    winner: np.ndarray
    runner_up: np.ndarray


def select(in_bag: np.ndarray, out_of_bag: np.ndarray, last_stage: np.ndarray, sign: float) -> Selection:
    """Repeat the selection of a study on resamples.

    At each stage as many parameter sets train on as did in the study: those with the best in-bag values. Where that is
    one which the study has not trained further, it takes the later values of one which the study has trained further
    and the resample has not, shifted by what differs between the two at this stage, times the slope of the later
    values on those of this stage between the resamples of one parameter set. Without that, the parameter sets that are
    left would be those which were lucky on rows that are out of bag now.

    Args:
        in_bag: [T, stages, B]; NaN at stages that a parameter set has not reached.
        out_of_bag: of the same shape.
        last_stage: int [T], the last stage that each parameter set has reached.
        sign: 1 where a higher value is better, else -1.
    """
    in_bag, out_of_bag = sign * in_bag, sign * out_of_bag
    n_stages = in_bag.shape[1]
    for stage in range(n_stages - 1):
        slopes = [
            tuple(_slope(values[:, stage], values[:, later]) for values in (in_bag, out_of_bag))
            for later in range(stage + 1, n_stages)
        ]
        here, further = last_stage >= stage, last_stage > stage
        for resample in range(in_bag.shape[2]):
            newcomers, leavers = _changes(in_bag[:, stage, resample], here, further)
            for place, values in enumerate((in_bag, out_of_bag)):
                column = values[:, :, resample]
                shift = column[newcomers, stage] - column[leavers, stage]
                for number, slope in enumerate(slopes):
                    column[leavers, stage + 1 + number] += slope[place] * shift
    known = np.isfinite(in_bag[:, -1])
    order = np.argsort(-np.where(known, in_bag[:, -1], -np.inf), axis=0, kind="stable")
    values = np.where(known, out_of_bag[:, -1], np.nan)  # where no parameter set has a value, there is no winner
    best = [np.take_along_axis(values, order[place : place + 1], axis=0) for place in (0, 1)]
    winner, second = (sign * each[0] if len(each) else np.full(in_bag.shape[2], np.nan) for each in best)
    return Selection(winner, second)


def _changes(values: np.ndarray, here: np.ndarray, further: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Who trains on in a resample but not in the study, and the other way round; the best first, as many of both."""
    count = int(further.sum())
    comparable = np.where(here & np.isfinite(values), values, -np.inf)
    order = np.argsort(-comparable, kind="stable")
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    selected = rank < count
    return order[(selected & ~further)[order]], order[(~selected & further)[order]]


def _slope(earlier: np.ndarray, later: np.ndarray) -> float:
    """How later values follow those of a stage, [T, B] each: between the resamples of one parameter set."""
    known = np.isfinite(earlier) & np.isfinite(later)
    count = np.maximum(known.sum(axis=1, keepdims=True), 1)
    x, y = (np.where(known, values, 0) for values in (earlier, later))
    x, y = (np.where(known, values - values.sum(axis=1, keepdims=True) / count, 0) for values in (x, y))
    spread = float((x * x).sum())
    return float((x * y).sum()) / spread if spread > 0 else 0.0
