"""The estimate of nested cross-validation: its value, its interval, and what is read from the inner studies."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_bge.errors import StudyError
from lightning_bge.hpo.analysis.winner import describe_nested
from lightning_bge.hpo.evaluation.nested import finish_nested, nested_estimate
from lightning_bge.hpo.trial.outer_fold import OuterFold, load_outer_fold, save_outer_fold
from lightning_bge.models.losses import Loss, LossConfig
from lightning_bge.models.metrics.compute import compute_metrics
from lightning_bge.models.metrics.names import METRICS
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.runtime.run_folder import write_json
from lightning_bge.types import Schema

SCHEMAS = {
    "binary": Schema("binary", ("no", "yes"), ("text",), 16),
    "multiclass": Schema("multiclass", ("a", "b", "c"), ("text",), 16),
    "multilabel": Schema("multilabel", ("a", "b", "c"), ("text",), 16),
    "regression": Schema("regression", (), ("text",), 16),
}
POOLED = (
    *("f1", "accuracy", "precision", "recall", "f0.5", "f2", "mcc", "kappa", "f1_micro", "f1_weighted"),
    *("mse", "mae"),
)


def made_folds(task: str, sizes: tuple[int, ...] = (40, 50, 60), group_size: int = 5) -> list[OuterFold]:
    """Predictions that are right more often than not, with a threshold of its own for each fold."""
    random = torch.Generator().manual_seed(3)
    folds, start = [], 0
    for number, size in enumerate(sizes):
        rows = torch.arange(start, start + size)
        outputs = SCHEMAS[task].num_outputs
        noise = torch.randn(size, outputs, generator=random)
        if task == "multiclass":
            labels = torch.randint(0, 3, (size,), generator=random)
            logits = noise + torch.eye(3)[labels]
        else:
            labels = (torch.rand(size, outputs, generator=random) < 0.4).float()
            labels = torch.randn(size, outputs, generator=random) if task == "regression" else labels
            logits = noise + labels
            labels = labels if task == "multilabel" else labels.squeeze(1)
        predictions = Predictions(rows, logits, labels, rows // group_size if task == "binary" else None)
        threshold = 0.5 + 0.1 * number if task in ("binary", "multilabel") else 0.5
        folds.append(OuterFold(predictions, threshold))
        start += size
    return folds


def pooled_decisions(task: str, folds: list[OuterFold]) -> Predictions:
    """Each row decided at the threshold of its fold, as an extreme logit."""
    parts = []
    for fold in folds:
        at = math.log(fold.threshold / (1 - fold.threshold))
        logits = fold.predictions.logits - (at if task in ("binary", "multilabel") else 0)
        parts.append(replace(fold.predictions, logits=logits))
    return Predictions.collect(parts)


@pytest.mark.parametrize(
    ("task", "metric"), [(task, m) for task, known in METRICS.items() for m in known if m != "loss"]
)
def test_the_value_is_that_of_torchmetrics_on_pooled_rows_or_the_mean_over_folds(task: str, metric: str) -> None:
    folds, schema = made_folds(task), SCHEMAS[task]
    found = nested_estimate(schema.task, metric, folds, n_resamples=50)
    of_folds = [
        compute_metrics(replace(schema, threshold=fold.threshold), fold.predictions, monitored=metric)[metric]
        for fold in folds
    ]
    assert found.folds == pytest.approx(of_folds, abs=1e-6)
    if metric in POOLED:
        pooled = compute_metrics(schema, pooled_decisions(task, folds), monitored=metric)[metric]
        assert found.value == pytest.approx(pooled, abs=1e-6)
        assert found.value != pytest.approx(np.mean(of_folds), abs=1e-6)
    else:
        assert found.value == pytest.approx(np.mean(of_folds), abs=1e-6)
    assert found.low < found.value < found.high


def test_the_interval_is_that_of_a_bootstrap_over_rows() -> None:
    right = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.7
    labels = torch.ones(400)
    predictions = Predictions(torch.arange(400), torch.where(right, 3.0, -3.0).unsqueeze(1), labels)
    halves = [
        Predictions(*(part[side] for part in (predictions.rows, predictions.logits, labels)))
        for side in (slice(0, 150), slice(150, 400))
    ]
    found = nested_estimate("binary", "accuracy", [OuterFold(half) for half in halves])
    share = float(right.float().mean())
    half_width = 1.96 * math.sqrt(share * (1 - share) / 400)
    assert found.value == pytest.approx(share)
    assert (found.low, found.high) == pytest.approx((share - half_width, share + half_width), abs=0.006)
    assert nested_estimate("binary", "accuracy", [OuterFold(half) for half in halves]) == found
    other = nested_estimate("binary", "accuracy", [OuterFold(half) for half in halves], seed=1)
    assert (other.value, other.low != found.low or other.high != found.high) == (found.value, True)


def test_rows_of_a_group_are_drawn_together() -> None:
    labels = torch.ones(400)
    groups = torch.arange(400) // 10
    right = torch.rand(40, generator=torch.Generator().manual_seed(0))[groups] < 0.7  # all rows of a group, or none
    logits = torch.where(right, 3.0, -3.0).unsqueeze(1)
    widths = []
    for known in (None, groups):
        fold = OuterFold(Predictions(torch.arange(400), logits, labels, known))
        found = nested_estimate("binary", "accuracy", [fold])
        widths.append(found.high - found.low)
    assert widths[1] / widths[0] == pytest.approx(math.sqrt(10), rel=0.15)


def test_a_model_that_has_diverged_leaves_no_value() -> None:
    folds = made_folds("binary")
    logits = folds[1].predictions.logits.clone()
    logits[3] = math.nan
    folds[1] = replace(folds[1], predictions=replace(folds[1].predictions, logits=logits))
    found = nested_estimate("binary", "f1", folds)
    assert all(math.isnan(value) for value in (found.value, found.low, found.high, *found.folds))


def test_a_fold_of_one_class_is_left_out_of_the_mean() -> None:
    folds = made_folds("binary")
    labels = torch.zeros_like(folds[0].predictions.rows, dtype=torch.float32)
    folds[0] = OuterFold(replace(folds[0].predictions, labels=labels))
    found = nested_estimate("binary", "auroc", folds, n_resamples=20)
    assert math.isnan(found.folds[0])
    assert found.value == pytest.approx(np.mean(found.folds[1:]))


@pytest.mark.parametrize(
    ("task", "config"),
    [
        ("binary", LossConfig("focal", class_weights=[1.0, 3.0])),
        ("multiclass", LossConfig(class_weights=[1.0, 2.0, 4.0], label_smoothing=0.1)),
        ("multilabel", LossConfig()),
        ("regression", LossConfig()),
    ],
)
def test_the_loss_is_that_of_all_rows_at_once(task: Any, config: LossConfig, tmp_path: Path) -> None:
    [fold] = made_folds(task, (30,))
    loss, labels = Loss(config, task, SCHEMAS[task].num_outputs), fold.predictions.labels
    assert labels is not None
    save_outer_fold(tmp_path, fold.predictions, loss)
    loaded = load_outer_fold(tmp_path, 0.25)
    assert loaded.threshold == 0.25
    for name, value in vars(fold.predictions).items():
        same = getattr(loaded.predictions, name)
        assert torch.equal(value, same) if isinstance(value, Tensor) else same is None
    found = nested_estimate(task, "loss", [loaded], n_resamples=20)
    expected = float(loss(fold.predictions.logits, labels) / loss.normalizer(labels))
    assert found.value == pytest.approx(expected, rel=1e-5)


def finished_inner_studies(folder: Path, folds: list[OuterFold]) -> None:
    for number, fold in enumerate(folds):
        run_dir = folder / "outer_folds" / str(number)
        run_dir.mkdir(parents=True)
        save_outer_fold(run_dir, fold.predictions, Loss(LossConfig(), "binary", 1))
        summary: dict[str, Any] = {"best_params": {"model.dropout": number / 10}, "threshold": fold.threshold}
        summary |= {"refit": {"epochs": 2}, "ensemble": None}
        if number == 2:
            summary |= {"refit": None, "ensemble": {"members": [{"epochs": 1}, {"epochs": 3}]}}
        write_json(run_dir / "summary.json", summary)


def test_the_results_name_what_each_inner_study_has_chosen(tmp_path: Path) -> None:
    folds = made_folds("binary")
    finished_inner_studies(tmp_path, folds)
    found = finish_nested(tmp_path, 3, SCHEMAS["binary"], "f1")
    expected = nested_estimate("binary", "f1", folds)
    assert (found["value"], found["low"], found["high"]) == (expected.value, expected.low, expected.high)
    assert found["n_outer_folds"] == 3
    assert found["folds"][1] == {
        "value": expected.folds[1],
        "rows": 50,
        "best_params": {"model.dropout": 0.1},
        "epochs": 2,
        "threshold": 0.6,
    }
    assert found["folds"][2]["epochs"] == [1, 3]
    with (tmp_path / "nested.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["row"]) for line in lines] == list(range(150))
    assert [line["outer_fold"] for line in lines] == ["0"] * 40 + ["1"] * 50 + ["2"] * 60
    decided = pooled_decisions("binary", folds)
    assert [line["label"] == "yes" for line in lines] == (decided.logits >= 0).squeeze(1).tolist()
    assert decided.labels is not None
    assert [line["truth"] == "yes" for line in lines] == decided.labels.bool().tolist()


def test_an_inner_study_that_has_not_finished_is_named(tmp_path: Path) -> None:
    finished_inner_studies(tmp_path, made_folds("binary"))
    (tmp_path / "outer_folds" / "1" / "summary.json").unlink()
    with pytest.raises(StudyError, match=r"outer_folds/1: expected a finished inner study.*Run the same command again"):
        finish_nested(tmp_path, 3, SCHEMAS["binary"], "f1")


def test_the_closing_words_state_the_price_and_how_the_value_was_made() -> None:
    found = {"value": 0.7, "low": 0.65, "high": 0.75, "n_outer_folds": 5, "how": "all rows together"}
    value, price = describe_nested(found)
    assert "nested     0.7000  95 % interval 0.6500 to 0.7500; all rows together" in value
    assert "price: 5 inner studies, about 6 times the hours" in price
    [missing] = describe_nested({**found, "value": None})
    assert "has no value" in missing
