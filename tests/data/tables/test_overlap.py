from __future__ import annotations

import numpy as np
import pytest

from lightning_bge.data.tables.overlap import warn_of_overlap, warn_of_overlap_of_folds


def test_rows_of_another_file(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_overlap(np.array([1, 2, 3]), np.array([4, 5]), "none.csv")
    assert not caplog.records
    for _ in range(2):
        warn_of_overlap(np.array([1, 2, 2, 3]), np.array([2, 5]), "some.csv")
    [record] = caplog.records
    assert record.message.startswith("some.csv: 2 of 4 rows (50.0%) have the same texts as rows that are trained on")


@pytest.mark.parametrize(
    ("hashes", "folds", "count"),
    [
        ([1, 2, 3, 4], [[0], [1], [2], [3]], 0),
        ([1, 1, 3, 4], [[0, 1], [2, 3]], 0),  # copies on one side
        ([1, 1, 3, 4], [[0, 2], [1, 3]], 2),
        ([1, 1, 1, 4], [[0, 1], [2, 3]], 3),
        ([1, 1, 3, 1], [[0]], 1),  # a single split: the others are trained on
    ],
)
def test_rows_of_folds(hashes: list[int], folds: list[list[int]], count: int, caplog: pytest.LogCaptureFixture) -> None:
    expected = sum(
        any(hashes[row] == hashes[other] for other in set(range(4)) - set(fold)) for fold in folds for row in fold
    )
    assert count == expected
    warn_of_overlap_of_folds(np.array(hashes), [np.array(fold) for fold in folds], f"{hashes} {folds}")
    texts = [record.message for record in caplog.records]
    assert len(texts) == bool(count)
    assert all(f": {count} of " in text for text in texts)
