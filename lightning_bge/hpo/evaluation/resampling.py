"""The rows that trials were validated on, and bootstrap resamples of them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_matrix

from lightning_bge.models.metrics.threshold import threshold_parts


@dataclass(frozen=True)
class ValidationRows:
    """The rows of all folds, each once.

    Attributes:
        labels: encoded, [N] or [N, L] (multi-label).
        fold: int64 [N], the fold that validates each row.
        groups: int64 [N], or None: rows are independent.
    """

    labels: np.ndarray
    fold: np.ndarray
    groups: np.ndarray | None = None

    @cached_property
    def of_fold(self) -> tuple[np.ndarray, ...]:
        """For each fold the positions of its rows, ascending."""
        return tuple(np.flatnonzero(self.fold == fold) for fold in range(int(self.fold.max()) + 1))

    @cached_property
    def parts(self) -> np.ndarray:
        """int64 [N], the part of its fold that each row is in where a threshold is cross-fitted."""
        found = np.zeros(len(self.fold), dtype=np.int64)
        for rows in self.of_fold:
            found[rows] = threshold_parts(len(rows), None if self.groups is None else self.groups[rows])
        return found


@dataclass(frozen=True)
class Resamples:
    """B bootstrap resamples of N rows; about 63 % of the rows are in each.

    A row that was drawn twice counts once: with weights the in-bag scores would be noisier than those of a study, and
    select worse parameter sets than the study does.

    Attributes:
        in_bag: float32 [N, B], 1 for each row that was drawn, else 0.
        out_of_bag: float32 [N, B], 1 for each row that was not drawn, else 0.
    """

    in_bag: np.ndarray
    out_of_bag: np.ndarray

    @classmethod
    def draw(cls, rows: ValidationRows, count: int, seed: int) -> "Resamples":
        """Draw with replacement, as many rows as each fold has; with groups whole groups, as many as each fold has.

        Args:
            rows: the rows.
            count: B.
            seed: of the draws.
        """
        random = np.random.default_rng(seed)
        in_bag = np.zeros((len(rows.fold), count), dtype=np.float32)
        for fold in rows.of_fold:
            units = np.arange(len(fold))
            if rows.groups is not None:
                _, units = np.unique(rows.groups[fold], return_inverse=True)
            n_units = int(units.max()) + 1
            drawn = random.multinomial(n_units, np.full(n_units, 1 / n_units), size=count)
            in_bag[fold] = drawn.T[units] > 0
        return cls(in_bag, 1 - in_bag)

    def split(self, size: int) -> list["Resamples"]:
        """The same resamples, at most so many in each part."""
        starts = range(0, self.in_bag.shape[1], size)
        return [Resamples(self.in_bag[:, at : at + size], self.out_of_bag[:, at : at + size]) for at in starts]


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis of the values that are finite; NaN where none is."""
    known = np.isfinite(values)
    found: np.ndarray = np.where(known, values, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)
    return found


def sum_by(place: np.ndarray, count: int, weights: np.ndarray) -> np.ndarray:
    """Sums of the rows of a matrix that have the same place.

    Args:
        place: int [N]; rows with a place of `count` or more are left out.
        count: number of places.
        weights: float [N, B].

    Returns:
        float [count, B], of the dtype of `weights`.
    """
    starts = np.concatenate(([0], np.bincount(place, minlength=count)[:count].cumsum()))
    rows = np.argsort(place, kind="stable")[: starts[-1]]
    matrix = csr_matrix((np.ones(len(rows), weights.dtype), rows, starts), shape=(count, len(place)))
    found: np.ndarray = matrix @ weights
    return found
