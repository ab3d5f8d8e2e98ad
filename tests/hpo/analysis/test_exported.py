"""The sentences about the exported model."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_bge.hpo.analysis.exported import describe_exported

SCHEDULE = {"name": "linear", "epochs": 1, "warmup": 0.1}
THRESHOLD = {"threshold": 0.25, "threshold_source": "out-of-fold predictions of trial 7"}
REFIT: dict[str, Any] = {
    **{"train_file_rows": 1200, "val_file_rows": 0, "val_file_rows_left_out": 0, "outer_fold_rows_left_out": 0},
    **{"epochs": 1, "fold_epochs": [1, 2], "schedule": SCHEDULE, **THRESHOLD},
}


def test_a_refit_names_rows_epochs_schedule_and_threshold() -> None:
    assert describe_exported({"refit": REFIT}) == [
        "refitted on all 1,200 rows of the training file for 1 epoch, the mean of the folds' scored epochs",
        "learning-rate schedule, as in the trial: linear over 1 epoch, warm-up 10% of its steps",
        "threshold 0.250 comes from the out-of-fold predictions of trial 7",
    ]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"val_file_rows": 30}, "all 1,200 rows of the training file and all 30 rows of the validation file"),
        (
            {"outer_fold_rows_left_out": 300},
            "1,200 rows of the training file outside of the outer fold's 300 for 1",
        ),
        ({"val_file_rows_left_out": 30}, "not trained on: the 30 rows of the validation file"),
        ({"schedule": {**SCHEDULE, "epochs": 3, "warmup": 5}}, "linear over 3 epochs, warm-up 5 steps"),
        ({"schedule": {**SCHEDULE, "warmup": 0}}, "linear over 1 epoch, without warm-up"),
        ({"fold_epochs": [2], "epochs": 2}, "for 2 epochs, as in the scored epoch of the trial"),
    ],
)
def test_what_differs_is_said(changes: dict[str, Any], text: str) -> None:
    assert text in "\n".join(describe_exported({"refit": REFIT | changes}))


def test_a_task_without_a_threshold_names_none() -> None:
    assert "threshold" not in "\n".join(describe_exported({"refit": REFIT | {"threshold": None}}))
    assert describe_exported({"refit": None}) == describe_exported({}) == []


def test_calibration_and_ensemble() -> None:
    figures = [{"negative_log_likelihood": value, "expected_calibration_error": value / 2} for value in (0.5, 0.25)]
    calibration = {"temperature": 2.0, "before": figures[0], "after": figures[1], "note": "n"}
    members = [{"folder": f"fold-{k}", "rows": 800, "epochs": k + 1} for k in range(2)]
    found = describe_exported(
        {"calibration": calibration, "ensemble": {"members": members, "schedule": SCHEDULE, **THRESHOLD}}
    )
    assert found == [
        "calibrated by the temperature 2.000: negative log-likelihood 0.5000 before, 0.2500 after; "
        "expected calibration error 0.2500 before, 0.1250 after (n)",
        "exported: the models of the 2 folds, whose scores are averaged",
        "each is trained on the rows of the other folds (800, 800) to the epoch that was scored in its fold (1, 2)",
        "learning-rate schedule, as in the trial: linear over 1 epoch, warm-up 10% of its steps",
        "threshold 0.250 comes from the out-of-fold predictions of trial 7, each of which one model has made, and not "
        "their mean",
    ]
