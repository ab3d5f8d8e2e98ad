"""The coverage of nested cross-validation on made predictions, shortened."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

from lightning_bge.models.metrics.compute import compute_metrics
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.types import Schema
from tests.helpers.paths import ROOT


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))


@pytest.mark.parametrize(("metric", "group_size"), [("f1", 1), ("accuracy", 5)])
def test_the_estimate_is_unbiased_and_its_interval_holds_the_truth(metric: str, group_size: int) -> None:
    import nested_coverage

    found = nested_coverage.measure(nested_coverage.Case(metric, 500, group_size), repetitions=20)
    assert found["coverage"] >= 0.85  # 0.95 of 20 repetitions have a standard error of 0.05
    assert found["selected_error"] > 0.03  # the best of 40 equally good trials
    assert abs(found["error"]) < 3 * found["spread"] / math.sqrt(20)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "auroc"])
def test_the_true_value_is_that_of_very_many_rows(metric: str) -> None:
    import nested_coverage

    rng = np.random.default_rng(0)
    labels = (rng.random(200_000) < nested_coverage.POSITIVE).astype(np.float32)
    logits = nested_coverage._logits(rng, labels, np.arange(200_000), 1)[0]
    schema = Schema("binary", ("no", "yes"), ("text",), 16, threshold=0.55)
    predictions = Predictions(torch.arange(200_000), torch.from_numpy(logits)[:, None], torch.from_numpy(labels))
    expected = compute_metrics(schema, predictions)[metric]
    assert nested_coverage._truth(metric, [0.55]) == pytest.approx(expected, abs=0.005)
    assert nested_coverage._normal(0.3) == pytest.approx(norm.cdf(0.3))


def test_the_record_covers_the_truth_in_91_per_cent_of_its_repetitions_at_least(tmp_path: Path) -> None:
    import nested_coverage

    path = ROOT / "docs" / "benchmarks" / "nested_coverage.json"
    record = json.loads(path.read_text())
    assert record["repetitions"] >= 200
    assert len(record["cases"]) == len(nested_coverage.CASES)
    assert min(case["coverage"] for case in record["cases"]) >= 0.91
    nested_coverage.write_notes(tmp_path / path.name, record)
    assert (tmp_path / "nested_coverage.md").read_text() == path.with_suffix(".md").read_text()
