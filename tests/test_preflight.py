from __future__ import annotations

import pytest

from lightning_bge.preflight import dry_run_options


@pytest.mark.parametrize(
    ("trainer", "found"),
    [
        ({}, ""),
        ({"limit_train_batches": 1.0, "overfit_batches": 0.0, "fast_dev_run": False}, ""),
        ({"limit_train_batches": 1}, "trainer.limit_train_batches=1"),
        ({"limit_val_batches": 0}, "trainer.limit_val_batches=0"),
        ({"limit_test_batches": 0.5}, "trainer.limit_test_batches=0.5"),
        ({"overfit_batches": 3}, "trainer.overfit_batches=3"),
        ({"fast_dev_run": 2, "limit_val_batches": 0}, "trainer.fast_dev_run=2"),
    ],
)
def test_which_options_make_a_dry_run(trainer: dict, found: str) -> None:
    names = (
        "limit_predict_batches",
        "fast_dev_run",
        "overfit_batches",
        "limit_train_batches",
        "limit_val_batches",
        "limit_test_batches",
    )
    assert dry_run_options({**dict.fromkeys(names), **trainer}) == found
