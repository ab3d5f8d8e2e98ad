"""How often the interval of nested cross-validation holds the truth, on made predictions whose truth is known.

    python examples/benchmarks/nested_coverage.py                   # 200 repetitions of each case, a few minutes

No model is trained. Each trial of each inner study predicts a logit for each row: the signal of the row's label and
noise of its own, so that all trials are equally good and the best one is the luckiest. The inner study chooses trial
and threshold; its winner then predicts the outer fold with new noise. The estimate and the interval are those of
`nested_estimate`, which the program calls.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import git_commit, markdown_table, versions

from lightning_bge.data.tables.splits import SplitConfig, make_folds
from lightning_bge.hpo.evaluation.nested import NestedEstimate, nested_estimate
from lightning_bge.hpo.trial.outer_fold import OuterFold
from lightning_bge.models.metrics.compute import compute_metrics
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.models.metrics.threshold import best_threshold
from lightning_bge.runtime.run_folder import write_json, write_text
from lightning_bge.types import Schema

OUT = Path(__file__).parents[2] / "docs" / "benchmarks" / "nested_coverage.json"
SCHEMA = Schema("binary", ("no", "yes"), ("text",), 16)
POSITIVE = 0.4  # share of the rows
SIGNAL = 0.6  # the mean logit of a yes; that of a no is its negative, and the noise of a logit has variance 1
OF_GROUP = 0.4  # share of the noise's variance that the rows of a group have in common


@dataclass(frozen=True)
class Case:
    """A study that is simulated.

    Attributes:
        metric: f1 or accuracy at the threshold of the inner study, or auroc.
        rows: of the training file.
        group_size: rows of each group; 1: rows are independent.
        trials: of each study.
        outer_folds: of the nested cross-validation.
    """

    metric: str
    rows: int
    group_size: int = 1
    trials: int = 40
    outer_folds: int = 5


CASES = tuple(
    Case(metric, rows, group_size)
    for rows in (500, 2000)
    for metric, group_size in (("accuracy", 1), ("f1", 1), ("auroc", 1), ("f1", 5))
)


@dataclass(frozen=True)
class Repetition:
    """One simulated study: its estimate, the true value, and the score by which its winner was selected."""

    found: NestedEstimate
    truth: float
    selected: float

    @property
    def covered(self) -> bool:
        """Whether the interval holds the truth."""
        return self.found.low <= self.truth <= self.found.high


def simulate(case: Case, seed: int) -> Repetition:
    """One study, with the inner studies of its nested cross-validation."""
    rng = np.random.default_rng(seed)
    groups = np.arange(case.rows) // case.group_size
    labels = (rng.random(case.rows) < POSITIVE).astype(np.float32)
    given = groups if case.group_size > 1 else None
    split = SplitConfig(folds=case.outer_folds, seed=seed, stratified=False)
    outer_folds = make_folds(labels, "binary", split, groups=given)
    parts, thresholds = [], []
    for rows in outer_folds:
        others = np.setdiff1d(np.arange(case.rows), rows)
        _, threshold = _winner(case, _logits(rng, labels[others], groups[others], case.trials), labels[others])
        logits = torch.from_numpy(_logits(rng, labels[rows], groups[rows], 1)[0]).unsqueeze(1)
        grouped = None if given is None else torch.from_numpy(groups[rows])
        predictions = Predictions(torch.from_numpy(rows), logits, torch.from_numpy(labels[rows]), grouped)
        parts.append(OuterFold(predictions, threshold))
        thresholds.append(threshold)
    found = nested_estimate(SCHEMA.task, case.metric, parts)
    selected, _ = _winner(case, _logits(rng, labels, groups, case.trials), labels)
    return Repetition(found, _truth(case.metric, thresholds), selected)


def _logits(rng: np.random.Generator, labels: np.ndarray, groups: np.ndarray, trials: int) -> np.ndarray:
    """Float32 [trials, N]; the noise is new for each trial. That of a group makes its rows right or wrong together."""
    share = OF_GROUP if len(np.unique(groups)) < len(groups) else 0.0
    own = rng.normal(0, math.sqrt(1 - share), (trials, len(labels)))
    common = rng.normal(0, math.sqrt(share), (trials, int(groups.max()) + 1))[:, groups]
    return ((SIGNAL + common) * (2 * labels - 1) + own).astype(np.float32)


def _winner(case: Case, logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Score and threshold of the trial with the best score at its own best threshold."""
    best = (-math.inf, 0.5)
    truth = torch.from_numpy(labels)
    for one in logits:
        score = torch.from_numpy(one).sigmoid()
        threshold = best_threshold(score.numpy(), labels, case.metric)
        value = _score(case.metric, score, truth, threshold)
        best = max(best, (value, threshold))
    return best


def _score(metric: str, score: torch.Tensor, truth: torch.Tensor, threshold: float) -> float:
    if metric == "auroc":
        predictions = Predictions(torch.arange(len(score)), score.logit().unsqueeze(1), truth)
        return compute_metrics(SCHEMA, predictions)["auroc"]
    yes = (score >= threshold).float()
    if metric == "accuracy":
        return float((yes == truth).float().mean())
    return float(2 * (yes * truth).sum() / (yes.sum() + truth.sum()).clamp(min=1))


def _truth(metric: str, thresholds: Sequence[float]) -> float:
    """The metric on infinitely many rows, an equal part of them at each threshold."""
    if metric == "auroc":
        return _normal(2 * SIGNAL / math.sqrt(2))
    cuts = [math.log(threshold / (1 - threshold)) for threshold in thresholds]
    hits = POSITIVE * float(np.mean([_normal(SIGNAL - cut) for cut in cuts]))
    false = (1 - POSITIVE) * float(np.mean([_normal(-SIGNAL - cut) for cut in cuts]))
    if metric == "accuracy":
        return hits + 1 - POSITIVE - false
    return 2 * hits / (hits + false + POSITIVE)


def _normal(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def measure(case: Case, repetitions: int, seed: int = 0) -> dict[str, float]:
    """Coverage, mean errors and mean width over repetitions."""
    runs = [simulate(case, seed + number) for number in range(repetitions)]
    errors = np.array([run.found.value - run.truth for run in runs])
    return {
        "coverage": float(np.mean([run.covered for run in runs])),
        "truth": float(np.mean([run.truth for run in runs])),
        "error": float(errors.mean()),
        "spread": float(errors.std(ddof=1)),
        "width": float(np.mean([run.found.high - run.found.low for run in runs])),
        "selected_error": float(np.mean([run.selected - run.truth for run in runs])),
    }


def write_notes(out: Path, record: dict[str, Any]) -> None:
    """The Markdown page of a record."""
    header = ["metric", "rows", "rows of a group", "coverage of 95 %", "true value", "mean error", "its spread"]
    header += ["width / (3.92 x spread)", "mean error of the selected score"]
    rows = [
        [
            *(line[name] for name in ("metric", "rows", "group_size")),
            f"{line['coverage']:.3f}",
            *(f"{line[name]:.4f}" for name in ("truth", "error", "spread")),
            f"{line['width'] / (2 * 1.96 * line['spread']):.2f}",
            f"{line['selected_error']:.4f}",
        ]
        for line in record["cases"]
    ]
    parts = [
        "# Nested cross-validation on made predictions",
        f"Written {record['written']} at commit {record['git_commit'] or 'unknown'} by "
        f"`examples/benchmarks/nested_coverage.py`: {record['repetitions']} repetitions of each case, "
        f"{CASES[0].trials} equally good trials, {CASES[0].outer_folds} outer folds, {POSITIVE:.0%} of the rows with a "
        "yes. The standard error of a coverage of 0.95 is "
        f"{math.sqrt(0.95 * 0.05 / record['repetitions']):.3f}.",
        markdown_table(header, rows),
        "The true value is that of the inner studies' models at their thresholds on infinitely many rows. The selected "
        "score is the best of the trials of the study on all rows, at its own best threshold. With groups of 5 rows "
        f"{OF_GROUP:.0%} of the noise's variance makes all rows of a group right or wrong together, and the bootstrap "
        "draws groups. Real models of "
        "different outer folds have most of their training rows in common, which is not simulated: it makes the "
        "interval of any cross-validation too narrow (Bates, Hastie, Tibshirani 2021, arXiv:2104.00673).",
    ]
    write_text(out.with_suffix(".md"), "\n\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200, help="of each case; default 200")
    parser.add_argument("--seed", type=int, default=0, help="of the first repetition; default 0")
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    record = {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "versions": versions(),
        "repetitions": chosen.repetitions,
        "seed": chosen.seed,
        "cases": [asdict(case) | measure(case, chosen.repetitions, chosen.seed) for case in CASES],
    }
    write_json(chosen.out, record)
    write_notes(chosen.out, record)
    print(chosen.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
