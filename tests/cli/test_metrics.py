"""Metrics by name and by class, from the command line to the files of a run."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.metrics import brier_score_loss, matthews_corrcoef

from lightning_bge.hpo.trial.fold_callbacks import early_stopping
from lightning_bge.models.metrics.config import MonitorConfig
from lightning_bge.models.metrics.threshold import best_threshold

Run = Callable[..., tuple[int, str, str]]
FBETA = "{class_path: torchmetrics.classification.BinaryFBetaScore, init_args: {beta: 2.0}}"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_fit_with_a_class_of_torchmetrics(sample: Path, options: list[str], tmp_path: Path, run: Run) -> None:
    test = ("--data.test_file", str(sample / "test.csv"))
    status, out, err = run("fit", *options, *test, "--monitor.metric", FBETA, "--monitor.patience", "1")
    assert status == 0, err
    folder = tmp_path / "study"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metric"] == "binary_fbeta_score"
    assert {"binary_fbeta_score"} <= summary["validation"].keys() & summary["test"].keys()
    assert "val_binary_fbeta_score" in (folder / "report.html").read_text()
    monitor = yaml.safe_load((folder / "config.yaml").read_text())["monitor"]
    assert monitor["metric"]["init_args"] == {"beta": 2.0}
    assert monitor["mode"] == "max"
    status, out, err = run("fit", *options, *test, "--monitor.metric", FBETA, "--monitor.patience", "1")
    assert (status, "is finished" in out) == (0, True), err


def test_a_study_of_a_class_minimises_it_and_has_no_corrected_score(
    search: list[str], tmp_path: Path, run: Run
) -> None:
    metric = ("--monitor.metric", "torchmetrics.MeanSquaredError", "--hpo.baseline", "false")
    status, out, err = run(*search, *metric)
    assert status == 0, err
    assert "mean_squared_error of the winner" in out
    assert "no corrected score: a metric by class_path" in out
    folder = tmp_path / "study"
    summary = json.loads((folder / "summary.json").read_text())
    values = [float(row["value"]) for row in rows(folder / "trials.csv") if row["state"] == "COMPLETE"]
    assert summary["best_value"] == min(values)
    oof = rows(folder / "oof.csv")
    expected = brier_score_loss([int(row["truth"]) for row in oof], [float(row["score"]) for row in oof])
    assert summary["out_of_fold"]["mean_squared_error"] == pytest.approx(expected, abs=1e-4)
    truth = [int(row["truth"]) for row in oof]
    assert summary["majority_baseline"] == pytest.approx(
        min(sum(truth), len(truth) - sum(truth)) / len(truth), abs=1e-4
    )
    assert run("status", str(folder))[1].count("mean_squared_error") >= 1
    status, _, err = run("fit", "-c", str(folder / "best.yaml"), "--run_dir", str(tmp_path / "fit"))
    assert status == 0, err


def test_a_study_of_mcc_has_a_corrected_score(search: list[str], tmp_path: Path, run: Run) -> None:
    status, _, err = run(*search, "--monitor.metric", "mcc", "--hpo.baseline", "false")
    assert status == 0, err
    summary = json.loads((tmp_path / "study" / "summary.json").read_text())
    assert summary["estimate"]["corrected"] is not None
    assert summary["majority_baseline"] == 0
    oof = rows(tmp_path / "study" / "oof.csv")
    score, truth, fold = (np.array([float(row[name]) for row in oof]) for name in ("score", "truth", "fold"))
    # each fold is decided at the threshold of the other one
    limits = [best_threshold(score[fold == other], truth[fold == other], "mcc") for other in (1, 0)]
    decided = score >= np.where(fold == 0, *limits)
    assert summary["out_of_fold"]["mcc"] == pytest.approx(matthews_corrcoef(truth, decided), abs=1e-9)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("torchmetrics.Nope", "monitor.metric: expected the path of a class that inherits from torchmetrics.Metric"),
        ("torchmetrics.text.BLEUScore", "torchmetrics.text.BLEUScore can't be computed of the scores"),
        ("f3", "monitor.metric: a binary task has f1, "),
    ],
)
@pytest.mark.parametrize("command", ["fit", "hpo"])
def test_a_wrong_metric_is_one_line_before_anything_is_written(
    options: list[str], search: list[str], tmp_path: Path, run: Run, command: str, metric: str, expected: str
) -> None:
    arguments = search if command == "hpo" else ["fit", *options]
    status, _, err = run(*arguments, "--monitor.metric", metric)
    assert status == 2
    assert expected in err.strip().splitlines()[-1]
    assert not (tmp_path / "study").exists()


def test_outer_folds_need_a_metric_with_a_name(search: list[str], run: Run) -> None:
    status, _, err = run(*search, "--hpo.outer_folds", "2", "--monitor.metric", "torchmetrics.AUROC")
    assert status == 2
    assert "hpo.outer_folds: expected null with a metric by class_path" in err


def test_early_stopping_gets_the_smallest_improvement() -> None:
    [stop] = early_stopping(MonitorConfig("f1", patience=2, min_delta=0.01))
    assert (stop.patience, stop.min_delta, stop.mode) == (2, 0.01, "max")  # type: ignore[attr-defined]
    [stop] = early_stopping(MonitorConfig("loss", patience=2, min_delta=0.01))
    assert (stop.min_delta, stop.mode) == (-0.01, "min")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("task", "labels", "metric"),
    [("binary", ["1"] * 4, "auroc"), ("regression", ["2.5"] * 4, "spearman")],
    ids=["one class", "constant"],
)
@pytest.mark.parametrize("command", ["validate", "test"])
def test_rows_on_which_the_metric_can_not_be_computed_are_warned_of(
    run: Run, options: list[str], tmp_path: Path, command: str, task: str, labels: list[str], metric: str
) -> None:
    def write(name: str, values: list[str]) -> str:
        path = tmp_path / name
        path.write_text("text,label\n" + "".join(f"text number {n},{value}\n" for n, value in enumerate(values)))
        return str(path)

    common = [*options, "--data.text_columns", "text", "--data.group_column", "null", "--model.task", task]
    train = write("train.csv", ["0", "1"] * 10)
    status, _, err = run("fit", *common, "--data.train_file", train, "--trainer.max_epochs", "1")
    assert status == 0, err
    kind = "val" if command == "validate" else "test"
    files = [f"--data.{kind}_file", write("rows.csv", labels), "--data.train_file", train]
    model = ["--model.name_or_path", str(tmp_path / "study" / "model"), "--monitor.metric", metric]
    status, out, err = run(command, *common, *model, *files)
    assert status == 0, err
    assert f"the metric {metric} can't be computed on these 4 rows" in err
    assert f"{kind}_loss" in out
