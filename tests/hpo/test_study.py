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

from lightning_bge.errors import StudyError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.results import describe_study, trials_table, wall_seconds
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.study import open_study, run_study
from lightning_bge.hpo.trial.out_of_fold import (
    judge_out_of_fold,
    load_predictions,
    majority_baseline,
    predictions_file,
    save_predictions,
)
from lightning_bge.models.metrics import Predictions
from lightning_bge.types import Schema

SPACE = {"model.optimizer.lr": {"low": 0.0, "high": 1.0}}
CONFIG = StudyConfig(n_trials=6, space=SPACE, pruner=PrunerConfig(name="none"), sampler="random")
BINARY = Schema("binary", ("no", "yes"), ("text",), 16)


def opened(folder: Path, config: StudyConfig = CONFIG, **settings: Any) -> optuna.Study:
    return open_study(folder, config, "maximize", Steps(2, 2), {"model.name_or_path": "m", **settings})


def value(trial: optuna.Trial) -> float:
    return trial.suggest_float("model.optimizer.lr", 0.0, 1.0)


def test_a_study_goes_on_where_it_was_and_does_not_draw_the_same_points_again(tmp_path: Path) -> None:
    run_study(opened(tmp_path), value, StudyConfig(n_trials=3, space=SPACE), "f1", 4)
    study = opened(tmp_path)
    run_study(study, value, CONFIG, "f1", 4)
    assert len(study.trials) == 6
    assert len({trial.value for trial in study.trials}) == 6
    run_study(study, value, CONFIG, "f1", 4)
    assert len(study.trials) == 6


def test_other_options_or_another_space_are_named(tmp_path: Path) -> None:
    opened(tmp_path)
    with pytest.raises(StudyError, match=r"model.name_or_path: m in the folder, other requested"):
        open_study(tmp_path, CONFIG, "maximize", Steps(2, 2), {"model.name_or_path": "other"})
    wider = StudyConfig(n_trials=6, space={"model.optimizer.lr": {"low": 0.0, "high": 2.0}}, pruner=CONFIG.pruner)
    with pytest.raises(StudyError, match=r"hpo.space.model.optimizer.lr.high: 1\.0 in the folder, 2\.0 requested"):
        opened(tmp_path, wider)


def test_each_trial_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sometimes(trial: optuna.Trial) -> float:
        if trial.number == 1:
            trial.report(0.25, 2)
            trial.set_user_attr("pruned_at", 2)
            raise optuna.TrialPruned
        return value(trial)

    run_study(opened(tmp_path), sometimes, StudyConfig(n_trials=2, space=SPACE), "f1", 4)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("[1/2] trial 0 done: f1 0.")
    assert "0 pruned | best 0." in first
    assert second.startswith("[2/2] trial 1 pruned at step 2 of 4: f1 0.2500 | 1 pruned")
    assert second.endswith("about 0:00:00 left")


def test_a_failing_trial_ends_the_study_with_its_error(tmp_path: Path) -> None:
    def fails(trial: optuna.Trial) -> float:
        raise ZeroDivisionError

    study = opened(tmp_path)
    with pytest.raises(ZeroDivisionError):
        run_study(study, fails, CONFIG, "f1", 4)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]


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


@pytest.mark.parametrize(
    ("task", "labels", "metric", "expected"),
    [
        ("binary", [1.0, 0.0, 0.0, 0.0], "accuracy", 0.75),
        ("binary", [1.0, 0.0, 0.0, 0.0], "f1", 0.4),
        ("binary", [1.0, 0.0, 0.0, 0.0], "average_precision", 0.25),
        ("multiclass", [0, 1, 1, 2], "accuracy", 0.5),
        ("regression", [1.0, 3.0], "mse", 1.0),
        ("regression", [1.0, 3.0], "spearman", 0.0),
    ],
)
def test_the_baseline_is_the_best_of_the_constant_answers(
    task: Any, labels: list[float], metric: str, expected: float
) -> None:
    names = ("a", "b", "c") if task == "multiclass" else BINARY.labels
    schema = Schema(task, names if task != "regression" else (), ("text",), 16)
    rows = torch.arange(len(labels))
    predictions = Predictions(rows, torch.randn(len(labels), schema.num_outputs), torch.tensor(labels))
    assert majority_baseline(schema, predictions, metric) == pytest.approx(expected)


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
    three = judge_out_of_fold(out_of_fold(tmp_path, 3), BINARY, "f1")
    one = judge_out_of_fold(out_of_fold(tmp_path, 1), BINARY, "f1")
    assert three.threshold == one.threshold  # the one that is stored is chosen on all rows
    assert "other folds" in three.threshold_note
    assert "optimistic" in one.threshold_note
    assert three.metrics["f1"] <= one.metrics["f1"]
    assert three.metrics["auroc"] == pytest.approx(one.metrics["auroc"])  # of the scores, not of the decisions


def test_the_closing_lines_name_the_results_and_the_files() -> None:
    summary = {
        **dict.fromkeys(("n_complete", "n_pruned", "n_failed", "best_trial", "refit_epochs"), 3),
        **dict.fromkeys(("wall_seconds", "best_value", "majority_baseline", "threshold"), 0.5),
        **{
            "study": "s",
            "task": "binary",
            "n_out_of_memory": 0,
            "seed_replicates": None,
            "metric": "f1",
            "best_params": {"lr": 0.1},
            "threshold_note": "note",
        },
        **{"out_of_fold": {"f1": 0.75}, "model_dir": "runs/s/model", "test": {"f1": 0.625}},
    }
    text = describe_study(Path("runs/s"), summary)
    for part in ("majority class: 0.5000", "out-of-fold f1 0.7500", "scored once: f1 0.6250", "model/"):
        assert part in text
