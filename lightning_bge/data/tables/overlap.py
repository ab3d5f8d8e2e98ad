"""Texts that are trained on and scored: such scores are too high."""

import logging
from collections.abc import Sequence

import numpy as np

from lightning_bge.runtime.log_once import log_once

log = logging.getLogger(__name__)


def warn_of_overlap(scored: np.ndarray, trained: np.ndarray, what: str) -> None:
    """Warn once where rows that are scored have the texts of rows that are trained on.

    Args:
        scored: int64 [N], hashes of the texts of rows that are scored.
        trained: int64 [M], those of the rows that are trained on.
        what: the rows that are scored, for the message.
    """
    count = int(np.isin(scored, trained).sum())
    if count:
        log_once(
            log,
            logging.WARNING,
            f"{what}: {count:,} of {len(scored):,} rows ({count / len(scored):.1%}) have the same texts as rows that "
            "are trained on: the scores will be too high. Drop these rows, or keep equal texts on one side with "
            "data.group_column",
        )


def warn_of_overlap_of_folds(hashes: np.ndarray, folds: Sequence[np.ndarray], where: str) -> None:
    """Warn once where rows of a fold have the texts of rows outside of it.

    Args:
        hashes: int64 [N], hashes of the texts of all rows.
        folds: row numbers of each fold, int64; with a single one the other rows are trained on.
        where: the files.
    """
    _, place, count = np.unique(hashes, return_inverse=True, return_counts=True)
    if count.max() == 1:
        return
    rows = np.unique(np.concatenate(folds))
    crossing = 0
    for fold in folds:
        inside = np.bincount(place[fold], minlength=len(count))
        crossing += int((count[place[fold]] > inside[place[fold]]).sum())
    if crossing:
        log_once(
            log,
            logging.WARNING,
            f"{where}: {crossing:,} of {len(rows):,} validation rows ({crossing / len(rows):.1%}) have the same texts "
            "as rows that are trained on: the scores will be too high. Drop the copies, or keep equal texts on one "
            "side with data.group_column",
        )
