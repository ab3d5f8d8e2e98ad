"""Nested cross-validation: what the rows of the outer folds say about a study, with an interval."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lightning_bge.errors import StudyError
from lightning_bge.hpo.config import OUTER_FOLDS
from lightning_bge.hpo.evaluation.decision_counts import Decider, count_decisions
from lightning_bge.hpo.evaluation.estimate import Interval
from lightning_bge.hpo.evaluation.resampled_metrics import resampled_metric
from lightning_bge.hpo.evaluation.resampling import mean_of_known
from lightning_bge.hpo.trial.outer_fold import OuterFold, load_outer_fold
from lightning_bge.models.metrics.names import DECISION_METRICS, HAS_THRESHOLD
from lightning_bge.models.metrics.predictions import scores
from lightning_bge.models.output.prediction_file import prediction_columns
from lightning_bge.runtime.run_folder import read_json, write_text
from lightning_bge.types import Schema, Task

POOLED = (*DECISION_METRICS, "loss", "mse", "mae")  # of the rows of all outer folds together
RESAMPLES = 1000
BLOCK = 2_000_000  # numbers of a block of resamples: 16 MB for each array of them


@dataclass(frozen=True)
class NestedEstimate:
    """The metric on rows that the models have not seen, in any choice of theirs.

    Attributes:
        value: of the pooled rows, or (ranking metrics, correlations and r2) the mean over the outer folds; NaN where it
            is not defined.
        low: lower end of the 95 % interval.
        high: its upper end.
        folds: the value of each outer fold.
    """

    value: float
    low: float
    high: float
    folds: tuple[float, ...]


@dataclass(frozen=True)
class _Rows:
    """What a metric is computed from.

    Attributes:
        outputs: logits [N, outputs]; decisions as logits 1 and -1; for the loss what each row adds to it, [N].
        labels: encoded; for the loss what each row adds to its divisor, [N].
        groups: int64 [N], or None.
    """

    outputs: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None

    @classmethod
    def of(cls, task: Task, metric: str, fold: OuterFold) -> _Rows:
        known = fold.predictions
        assert known.labels is not None
        groups = None if known.groups is None else known.groups.numpy()
        if metric == "loss":
            assert fold.losses is not None
            assert fold.loss_shares is not None
            return cls(fold.losses.numpy(), fold.loss_shares.numpy(), groups)
        outputs = known.logits.numpy()
        if metric in DECISION_METRICS and task in HAS_THRESHOLD:
            outputs = np.where(scores(task, known.logits).numpy() >= fold.threshold, 1.0, -1.0).reshape(outputs.shape)
        return cls(outputs, known.labels.numpy(), groups)

    @classmethod
    def pool(cls, parts: Sequence[_Rows]) -> _Rows:
        """The rows of all outer folds."""
        groups = [part.groups for part in parts if part.groups is not None]
        outputs, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("outputs", "labels"))
        return cls(outputs, labels, np.concatenate(groups) if groups else None)

    def metric(self, task: Task, metric: str, weights: np.ndarray) -> np.ndarray:
        """The metric of each resample, [B]; `weights`: how often each row is in each resample, float [N, B]."""
        if metric == "loss":
            found: np.ndarray = (self.outputs @ weights) / (self.labels @ weights)
            return found
        if metric in DECISION_METRICS:
            [counts] = count_decisions(Decider.fixed(task), self.outputs, self.labels, weights)
            return counts.metric(metric, task)[0]
        return resampled_metric(task, metric, self.outputs, self.labels, weights, self.groups)


def nested_estimate(
    task: Task, metric: str, folds: Sequence[OuterFold], *, n_resamples: int = RESAMPLES, seed: int = 0
) -> NestedEstimate:
    """The metric over the rows of all outer folds, with a percentile bootstrap over rows, or over groups if there are.

    Decisions, and means over rows (loss, mse, mae), are pooled: each row is decided at the threshold of its own fold.
    Ranking metrics, correlations and r2 are computed in each outer fold and averaged, as scores of different models
    can't be compared. In a resample an outer fold has as many rows as were drawn of it.

    Args:
        task: binary, multiclass, multilabel or regression.
        metric: its name.
        folds: of all outer folds.
        n_resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    if not all(bool(fold.predictions.logits.isfinite().all()) for fold in folds):  # as in `compute_metrics`
        return NestedEstimate(math.nan, math.nan, math.nan, (math.nan,) * len(folds))
    parts = [_Rows.of(task, metric, fold) for fold in folds]
    pooled, sizes = _Rows.pool(parts), [len(part.labels) for part in parts]

    def overall(weights: np.ndarray) -> np.ndarray:
        if metric in POOLED:
            return pooled.metric(task, metric, weights)
        each = np.split(weights, np.cumsum(sizes)[:-1])
        return mean_of_known(np.array([part.metric(task, metric, own) for part, own in zip(parts, each, strict=True)]))

    every = np.concatenate([overall(weights) for weights in _resamples(pooled, n_resamples, seed)])
    interval = Interval.of(every)  # a resample may lack a class
    low, high = (math.nan, math.nan) if interval is None else (interval.low, interval.high)
    of_folds = [part.metric(task, metric, np.ones((size, 1))) for part, size in zip(parts, sizes, strict=True)]
    value = float(overall(np.ones((sum(sizes), 1)))[0])
    return NestedEstimate(value, low, high, tuple(float(one[0]) for one in of_folds))


def _resamples(rows: _Rows, count: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of resamples, float64 [N, B]: how often each row is drawn, itself or with its group."""
    units = np.arange(len(rows.labels))
    if rows.groups is not None:
        units = np.unique(rows.groups, return_inverse=True)[1]
    rng, n_units = np.random.default_rng(seed), int(units.max()) + 1
    block = max(1, BLOCK // len(units))
    for start in range(0, count, block):
        drawn = [np.bincount(rng.integers(0, n_units, n_units), minlength=n_units) for _ in range(start, count)[:block]]
        yield np.stack(drawn, axis=1)[units].astype(float)


# ---------------------------------------------------------------------- files


def finish_nested(run_dir: Path, n_outer_folds: int, schema: Schema, metric: str) -> dict[str, Any]:
    """The estimate from the inner studies of a run, as plain data; writes `nested.csv` into the run's folder.

    Args:
        run_dir: the run's folder.
        n_outer_folds: their number.
        schema: of the final model.
        metric: of the study.

    Raises:
        StudyError: an inner study has not finished.
    """
    folders = [run_dir / OUTER_FOLDS / str(k) for k in range(n_outer_folds)]
    summaries = [read_json(folder / "summary.json") for folder in folders]
    known = [summary for summary in summaries if summary is not None]
    if len(known) < n_outer_folds:
        raise StudyError(
            f"{folders[summaries.index(None)]}: expected a finished inner study of the nested cross-validation, but "
            "there is no summary.json. Run the same command again, which continues it"
        )
    folds = [load_outer_fold(folder, summary["threshold"]) for folder, summary in zip(folders, known, strict=True)]
    found = nested_estimate(schema.task, metric, folds)
    write_text(run_dir / "nested.csv", _table(schema, folds))
    of_folds = [
        {
            "value": _or_none(value),
            "rows": len(fold.predictions.rows),
            "best_params": summary["best_params"],
            "epochs": _epochs(summary),
            "threshold": summary["threshold"],
        }
        for value, fold, summary in zip(found.folds, folds, known, strict=True)
    ]
    ends = {name: _or_none(getattr(found, name)) for name in ("value", "low", "high")}
    how = "all rows together" if metric in POOLED else f"mean over {n_outer_folds} outer folds"
    return {**ends, "folds": of_folds, "n_outer_folds": n_outer_folds, "how": how}


def _epochs(summary: dict[str, Any]) -> int | list[int]:
    """Of the refit, or of each member of the ensemble."""
    if summary["ensemble"]:
        return [member["epochs"] for member in summary["ensemble"]["members"]]
    epochs: int = summary["refit"]["epochs"]
    return epochs


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _table(schema: Schema, folds: Sequence[OuterFold]) -> str:
    """The predictions of all outer folds as CSV, in the order of the file's rows."""
    parts = [prediction_columns(replace(schema, threshold=fold.threshold), fold.predictions) for fold in folds]
    lines: list[tuple[Any, ...]] = []
    for number, part in enumerate(parts):
        lines += [(*line, number) for line in zip(*part.values(), strict=True)]
    lines.sort(key=lambda line: line[0])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*parts[0], "outer_fold"])
    writer.writerows(lines)
    return text.getvalue()
