"""What a study ends with: the table of trials, thresholds on out-of-fold predictions, the closing lines."""

from __future__ import annotations

import csv
import io
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from lightning_bge.hpo.analysis.winner import describe_notes
from lightning_bge.hpo.finish.results import describe_study
from lightning_bge.hpo.finish.summary import trials_table, wall_seconds
from lightning_bge.hpo.trial.out_of_fold import (
    judge_out_of_fold,
    load_predictions,
    predictions_file,
    save_predictions,
)
from lightning_bge.models.metrics.config import MonitorConfig
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.types import Schema

BINARY = Schema("binary", ("no", "yes"), ("text",), 16)


def test_wall_seconds_counts_overlaps_once_and_pauses_not_at_all() -> None:
    study = optuna.create_study()
    start = datetime(2026, 1, 1)
    for begin, end in ((0, 10), (5, 12), (100, 103), (101, 102)):
        trial = create_trial(value=0.0)
        trial.datetime_start = start + timedelta(seconds=begin)
        trial.datetime_complete = start + timedelta(seconds=end)
        study.add_trial(trial)
    assert wall_seconds(study) == 15


def test_the_table_has_a_row_for_each_trial() -> None:
    study = optuna.create_study()
    lr = {"lr": FloatDistribution(0, 1)}
    study.add_trial(create_trial(value=0.5, params={"lr": 0.1}, distributions=lr, user_attrs={"fold_scores": [0.4]}))
    pruned = create_trial(
        state=TrialState.PRUNED,
        value=0.2,
        params={"lr": 0.2},
        distributions=lr,
        intermediate_values={1: 0.2},
        user_attrs={"pruned_at": 1},
    )
    study.add_trial(pruned)
    first, second = csv.DictReader(io.StringIO(trials_table(study)))
    assert (first["state"], first["value"], first["lr"], first["fold_scores"]) == ("COMPLETE", "0.5", "0.1", "[0.4]")
    assert (second["state"], second["value"], second["pruned_at"], second["reports"]) == ("PRUNED", "0.2", "1", "1")


def out_of_fold(tmp_path: Path, folds: int) -> Path:
    random = np.random.default_rng(0)
    labels = (random.random(60) < 0.4).astype(np.float32)
    logits = torch.from_numpy((labels * 2 + random.normal(size=60)).astype(np.float32))[:, None]
    parts = [
        Predictions(rows := torch.arange(k, 60, folds), logits[rows], torch.from_numpy(labels)[rows], rows // 3)
        for k in range(folds)
    ]
    save_predictions(parts, tmp_path, 7)
    return predictions_file(tmp_path, 7)


def test_predictions_come_back_in_the_order_of_the_rows(tmp_path: Path) -> None:
    found, fold = load_predictions(out_of_fold(tmp_path, 3))
    assert found.rows.tolist() == list(range(60))
    assert fold.tolist() == [row % 3 for row in range(60)]
    assert found.groups is not None
    assert found.groups.tolist() == [row // 3 for row in range(60)]
    assert not list(tmp_path.glob("*.draft"))


def test_the_threshold_is_judged_on_rows_it_has_not_seen(tmp_path: Path) -> None:
    three = judge_out_of_fold(out_of_fold(tmp_path, 3), BINARY, MonitorConfig("f1"))
    one = judge_out_of_fold(out_of_fold(tmp_path, 1), BINARY, MonitorConfig("f1"))
    assert three.threshold == one.threshold  # the one that is stored is chosen on all rows
    assert "other folds" in three.threshold_note
    assert "optimistic" in one.threshold_note
    assert three.metrics["f1"] <= one.metrics["f1"]
    assert three.metrics["auroc"] == pytest.approx(one.metrics["auroc"])  # of the scores, not of the decisions


def test_the_closing_lines_name_the_results_and_the_files() -> None:
    summary = {
        **dict.fromkeys(("n_complete", "n_pruned", "n_failed", "best_trial"), 3),
        **dict.fromkeys(("wall_seconds", "best_value", "majority_baseline", "threshold"), 0.5),
        **{"positive_label": "yes", "warnings": []},
        **{
            "study": "s",
            "task": "binary",
            "n_out_of_memory": 0,
            "seed_replicates": None,
            "metric": "f1",
            "sampler": "tpe",
            "estimate": {
                "corrected": {"value": 0.4321, "low": 0.3, "high": 0.55},
                "differences": {
                    "runner_up": {"value": 0.01, "low": -0.02, "high": 0.03, "excludes_zero": False},
                    "configured": {"value": 0.1, "low": 0.05, "high": 0.2, "excludes_zero": True},
                },
                "n_left_out": 2,
            },
            "best_params": {"lr": 0.1},
            "threshold_note": "note",
            "test_file": "test.csv",
            "nested": None,
        },
        **{"out_of_fold": {"f1": 0.75}, "model_dir": "runs/s/model", "test": {"f1": 0.625}},
        "computed_with": {"first": {"torch": "2.9"}, "others": [{"n_trials": 2, "versions": {"torch": "3.0"}}]},
    }
    text = describe_study(Path("runs/s"), summary)
    for part in (
        "selected   0.5000  mean over the folds; optimistic",
        "corrected  0.4321  95 % interval 0.3000 to 0.5500",
        "test       0.6250  test file, scored once",
        "not corrected: tpe has drawn later parameter sets by the scores of earlier ones",
        "left out of the correction: 2 parameter sets",
        "the configured hyperparameters  +0.1000  (+0.0500 to +0.2000)  better",
        "the second best                 +0.0100  (-0.0200 to +0.0300)  no more than noise",
        "majority class: f1 0.5000",
        "model/",
        "2 of the trials: computed with torch 3.0 instead of torch 2.9",
    ):
        assert part in text
    elsewhere = describe_study(Path("runs/s"), {**summary, "model_dir": "s3://bucket/run/model"})
    assert "exported model: s3://bucket/run/model" in elsewhere
    assert "  model/" not in elsewhere
    assert "journal.log" not in text
    assert "has copies" not in text
    assert "/mnt/team/run/ has copies" in describe_study(Path("runs/s"), summary, Path("/mnt/team/run"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metric": "loss", "estimate": None}, "no corrected score: monitor another metric than the loss"),
        ({"estimate": {"corrected": None}}, "no corrected score: too few rows for f1"),
        ({"estimate": {"n_left_out": 4}}, "no corrected score: the predictions of the complete trials are not kept"),
        ({"sampler": "random", "estimate": {"corrected": {"value": 1}, "n_left_out": 0}}, None),
    ],
)
def test_what_the_corrected_score_lacks_is_said(changes: dict[str, Any], says: str | None) -> None:
    lines = describe_notes({"metric": "f1", "sampler": "tpe", **changes})
    assert (says is None and not lines) or any(line.startswith(str(says)) for line in lines)
