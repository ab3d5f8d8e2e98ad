"""How far a study's scores are from the truth, where the truth is known: simulated trials, nothing is trained.

    python examples/benchmarks/selection_bias.py --repetitions 200

Each trial's outputs are `quality * (2 * label - 1)` and noise of its own, so that its true score is known. A study of
40 trials selects the winner, by the product's successive halving where trials are pruned, and
`hpo.evaluation.estimate`, which `lightning-bge hpo` calls at its end, corrects the winner's score. Beside it stands
what a fresh test set of as many rows (or groups) would say.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import git_commit, hardware, markdown_table, versions
from scipy.special import expit, logit
from scipy.stats import norm

from lightning_bge.hpo.evaluation.candidates import Candidate, CandidateScorer, Target, Validation
from lightning_bge.hpo.evaluation.estimate import Contest, estimate
from lightning_bge.hpo.evaluation.resampling import Resamples, ValidationRows
from lightning_bge.hpo.forecast.simulator import Durations, simulate_asha
from lightning_bge.hpo.pruning.config import PrunerConfig, rungs
from lightning_bge.hpo.steps import Steps
from lightning_bge.models.metrics.threshold import best_threshold
from lightning_bge.runtime.run_folder import write_json, write_text

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"
FOLDS, TRIALS = 3, 40
FRESH = 400  # fresh test sets


@dataclass(frozen=True)
class Scenario:
    """One kind of study.

    Attributes:
        name: for the table.
        rows: validation rows of all folds together.
        metric: accuracy or f1.
        tuned: whether the threshold is tuned.
        epochs: to choose from, all equally good.
        pruned: whether the default pruner stops trials.
        quality: mean over the trials; the accuracy at 0.5 is its normal distribution function.
        spread: standard deviation of the trials' qualities; 0: all are equally good.
        positive: share of positive rows.
        group: rows of a group, which have half of their noise in common; 1: rows are independent.
    """

    name: str
    rows: int = 500
    metric: str = "accuracy"
    tuned: bool = False
    epochs: int = 1
    pruned: bool = False
    quality: float = 0.55
    spread: float = 0.0
    positive: float = 0.5
    group: int = 1


SCENARIOS = (
    Scenario("equal trials"),
    Scenario("equal trials", rows=2000),
    Scenario("10 epochs", epochs=10),
    Scenario("10 epochs", epochs=10, rows=2000),
    Scenario("F1 at a tuned threshold", metric="f1", tuned=True),
    Scenario("F1 at a tuned threshold", metric="f1", tuned=True, rows=2000),
    Scenario("F1 at a tuned threshold, 20 % positive", metric="f1", tuned=True, positive=0.2),
    Scenario("groups of 5", group=5),
    Scenario("groups of 5", group=5, rows=2000),
    Scenario("default pruner, 5 epochs", epochs=5, pruned=True),
    Scenario("default pruner, 5 epochs", epochs=5, pruned=True, rows=2000),
    Scenario("default pruner, 5 epochs, F1", metric="f1", tuned=True, epochs=5, pruned=True),
    Scenario("unequal trials (0.05)", spread=0.05),
    Scenario("unequal trials (0.1)", spread=0.1),
    Scenario("unequal trials (0.15)", spread=0.15),
    Scenario("unequal trials (0.25)", spread=0.25),
    Scenario("unequal trials (0.1)", spread=0.1, rows=2000),
    Scenario("unequal trials (0.15), default pruner", spread=0.15, epochs=5, pruned=True),
    Scenario("unequal trials (0.15), F1", metric="f1", tuned=True, spread=0.15),
)


def outputs(scenario: Scenario, quality: float, labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Logits of a model of this quality for rows that lie group by group, [N, ...] as the labels."""
    noise = random.normal(size=labels.shape)
    if scenario.group > 1:
        shared = random.normal(size=(-(-len(labels) // scenario.group), *labels.shape[1:]))
        noise = (noise + shared.repeat(scenario.group, axis=0)[: len(labels)]) / 2**0.5
    found: np.ndarray = quality * (2 * labels - 1) + noise
    return found


def value(scenario: Scenario, logits: np.ndarray, labels: np.ndarray, threshold: float) -> np.ndarray:
    """The metric at a threshold, along the first axis."""
    yes, positive = logits >= threshold, labels > 0.5
    if scenario.metric == "accuracy":
        return (yes == positive).mean(0)
    found: np.ndarray = 2 * (yes & positive).sum(0) / np.maximum(yes.sum(0) + positive.sum(0), 1)
    return found


def truth(scenario: Scenario, quality: float, threshold: float) -> float:
    """The metric on endless fresh rows."""
    share = scenario.positive
    hits, false = share * norm.cdf(quality - threshold), (1 - share) * norm.cdf(-quality - threshold)
    if scenario.metric == "accuracy":
        return float(hits + 1 - share - false)
    return float(2 * hits / (hits + false + share))


def study(scenario: Scenario, seed: int) -> tuple[ValidationRows, Steps, np.ndarray, list[list[Validation]]]:
    """Rows, steps, the trials' qualities, and the validations that each would make in all."""
    random = np.random.default_rng(seed)
    labels = (random.random(scenario.rows) < scenario.positive).astype(np.float32)
    groups = np.arange(scenario.rows) // scenario.group
    rows = ValidationRows(labels, groups % FOLDS, groups if scenario.group > 1 else None)
    steps = Steps(FOLDS, scenario.epochs)
    quality = scenario.quality + scenario.spread * random.normal(size=TRIALS)
    trials = []
    for one in quality:
        trials.append(
            [
                Validation(step, outputs(scenario, one, labels[rows.of_fold[fold]], random)[:, None].astype(np.float32))
                for fold in range(FOLDS)
                for step in range(fold * scenario.epochs + 1, (fold + 1) * scenario.epochs + 1)
            ]
        )
    return rows, steps, quality, trials


def prune(values: np.ndarray, n_rungs: int) -> np.ndarray:
    """The last stage that each trial reaches with the product's successive halving, from its values at all stages."""
    count, steps = len(values), n_rungs + 1  # each stage is a step
    durations = Durations(
        np.zeros(count), np.ones((count, steps)), np.zeros((count, n_rungs)), np.zeros((count, n_rungs))
    )
    reduction_factor = PrunerConfig().reduction_factor
    found = simulate_asha(range(1, steps), reduction_factor, count, values, durations, workers=1)
    return np.array(found.steps) - 1


def repetition(scenario: Scenario, seed: int, n_resamples: int) -> dict[str, float]:
    """One study: the errors of its scores, and whether the interval has the truth."""
    rows, steps, quality, trials = study(scenario, seed)
    stages = [*(rungs(PrunerConfig(), steps)[0] if scenario.pruned else ()), steps.total]
    target = Target("binary", scenario.metric, scenario.tuned)
    everything = np.ones((scenario.rows, 1), dtype=np.float32)
    scorer = CandidateScorer(target, rows, Resamples(everything, everything), steps, stages)
    whole = [scorer.score(Candidate(number, steps.total, lambda one=one: one)) for number, one in enumerate(trials)]  # type: ignore[misc]
    values = np.stack([one.in_bag[:, 0] for one in whole])
    last = prune(values, len(stages) - 1) if scenario.pruned else np.zeros(TRIALS, dtype=int)
    candidates = [
        Candidate(number, stages[last[number]], lambda number=number: kept(trials[number], stages[last[number]]))  # type: ignore[misc]
        for number in range(TRIALS)
    ]
    complete = np.flatnonzero(last == len(stages) - 1)
    winner = int(complete[np.argmax(values[complete, -1])])
    threshold = shipped_threshold(scenario, rows, trials[winner]) if scenario.tuned else 0.0
    right = truth(scenario, quality[winner], threshold)
    found = estimate(
        Contest(target=target, rows=rows, steps=steps, candidates=candidates, replicates={}), n_resamples, seed
    )
    assert found.corrected is not None
    error, fresh = fresh_test(scenario, quality[winner], threshold, np.random.default_rng(10**6 + seed))
    return {
        "selected": float(values[winner, -1]) - right,
        "corrected": found.corrected.value - right,
        "covered": float(found.corrected.low <= right <= found.corrected.high),
        "width": (found.corrected.high - found.corrected.low) / fresh,
        "standard_error": error,
        "complete": float(len(complete)),
    }


def kept(validations: Sequence[Validation], step: int) -> list[Validation]:
    """Those until a step."""
    return [one for one in validations if one.step <= step]


def shipped_threshold(scenario: Scenario, rows: ValidationRows, validations: Sequence[Validation]) -> float:
    """The threshold that is best on all out-of-fold rows of the last epochs, as a logit; all are equally good."""
    last = [one for one in validations if one.step % scenario.epochs == 0]
    logits = np.concatenate([one.logits[:, 0] for one in last])
    labels = np.concatenate([rows.labels[mine] for mine in rows.of_fold])
    found: float = logit(best_threshold(expit(logits.astype(np.float64)), labels, scenario.metric))
    return found


def fresh_test(
    scenario: Scenario, quality: float, threshold: float, random: np.random.Generator
) -> tuple[float, float]:
    """Standard error of a fresh test set of as many rows, and the width of its 95 % interval."""
    labels = (random.random((scenario.rows, FRESH)) < scenario.positive).astype(np.float32)
    values = value(scenario, outputs(scenario, quality, labels, random), labels, threshold)
    low, high = np.percentile(values, [2.5, 97.5])
    return float(values.std()), float(high - low)


def run(scenario: Scenario, repetitions: int, n_resamples: int = 200) -> dict[str, Any]:
    """All repetitions of a scenario, as means."""
    found = [repetition(scenario, seed, n_resamples) for seed in range(repetitions)]
    means = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    spread = float(np.std([one["corrected"] for one in found], ddof=1))
    return {**asdict(scenario), "repetitions": repetitions, **means, "corrected_spread": spread}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200, help="of each scenario; default 200")
    parser.add_argument("--resamples", type=int, default=200, help="of each study; default 200")
    parser.add_argument("--scenarios", type=int, nargs="+", help="numbers of scenarios, from 0; default all")
    parser.add_argument("--out", type=Path, default=DOCS / "selection_bias.json")
    chosen = parser.parse_args()
    found = []
    for number in chosen.scenarios or range(len(SCENARIOS)):
        found.append(run(SCENARIOS[number], chosen.repetitions, chosen.resamples))
        print(row(found[-1]), flush=True)
    record = {
        "written": time.strftime("%Y-%m-%d"),
        "git_commit": git_commit(),
        "hardware": hardware(),
        "versions": versions(),
        "trials": TRIALS,
        "folds": FOLDS,
        "resamples": chosen.resamples,
        "scenarios": found,
    }
    write_json(chosen.out, record)
    write_text(chosen.out.with_suffix(".md"), note(record))


def row(one: dict[str, Any]) -> list[str]:
    """A scenario's line of the table."""
    return [
        one["name"],
        f"{one['rows']:,}",
        f"{one['selected']:+.4f}",
        f"{one['corrected']:+.4f}",
        f"{abs(one['corrected']) / abs(one['selected']):.2f}",
        f"{abs(one['corrected']) / one['standard_error']:.2f}",
        f"{one['covered']:.3f}",
        f"{one['width']:.2f}",
    ]


def note(record: dict[str, Any]) -> str:
    """The Markdown beside the JSON."""
    header = ["study", "rows", "error of the selected score", "of the corrected one", "ratio", "in standard errors"]
    header += ["coverage", "width"]
    first = record["scenarios"][0]
    return "\n".join(
        [
            "# Selected and corrected scores where the truth is known",
            "",
            f"Written {record['written']} at commit {record['git_commit']} by `examples/benchmarks/selection_bias.py`.",
            f"{record['trials']} simulated trials, {record['folds']} folds, {first['repetitions']} repetitions of each "
            f"study, {record['resamples']} resamples.",
            "",
            markdown_table(header, [row(one) for one in record["scenarios"]]),
            "",
            "Errors are means of the score less the truth. The ratio is that of the two errors; for unequal trials, "
            "whose selected score is less optimistic, the error in standard errors of a fresh test set of as many rows "
            "(or groups) says more. Coverage: how often the 95 % interval has the truth. Width: of the interval, "
            "in widths of that of a fresh test set.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
