"""One search twice, unpruned and with the product's default pruner: what is spent, and what is found.

    python examples/benchmarks/pruned_search.py trecqa --data FOLDER --model FOLDER --trials 24

The settings are drawn at random from the same seed, so that both try the same points; a search that was cut off draws
others when it goes on, and is refused. Of one that `record_searches.py` recorded in the same folder, with as many
trials or more, the first ones count as the unpruned search. Seconds are the process's CPU seconds of the reports that
were made, training and validation, as on a machine that does other work as well the wall time says little. What lies
outside of them (building, checkpoints, storage) is given in wall seconds, all trials together.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from common import git_commit, hardware, markdown_table, versions
from optuna.trial import FrozenTrial, TrialState
from record_searches import SEARCHES, add_arguments, search

from lightning_bge.hpo import PrunerConfig
from lightning_bge.hpo.promote import point_of
from lightning_bge.hpo.reports import Report
from lightning_bge.runs import write_json, write_text

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"


def reports_of(trial: FrozenTrial) -> list[Report]:
    """All its validations; of a resumed trial also those before it paused."""
    return [Report(*report) for fold in trial.user_attrs.get("curve", []) for report in fold]


def outside(trials: Sequence[FrozenTrial], latest: Sequence[FrozenTrial]) -> float:
    """Wall seconds of all trials, less those of their reports."""
    inside = sum(report.train_seconds + report.val_seconds for trial in latest for report in reports_of(trial))
    return sum(trial.duration.total_seconds() for trial in trials if trial.duration) - inside


def describe(trials: list[FrozenTrial], sign: float) -> dict[str, Any]:
    """Figures of a search."""
    latest = {point_of(trial): trial for trial in trials if trial.state != TrialState.FAIL}
    done = [trial for trial in latest.values() if trial.state == TrialState.COMPLETE]
    best = max(done, key=lambda trial: sign * trial.value)
    scores = best.user_attrs["fold_scores"]
    return {
        "points": len(latest),
        "complete": len(done),
        "reports": sum(len(trial.intermediate_values) for trial in latest.values()),
        "cpu_seconds": sum(r.train_cpu + r.val_cpu for trial in latest.values() for r in reports_of(trial)),
        "outside_seconds": outside(trials, list(latest.values())),
        "best_value": best.value,
        "best_params": best.params,
        "fold_scores": scores,
        "standard_error": float(np.std(scores, ddof=1) / len(scores) ** 0.5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("search", choices=list(SEARCHES))
    add_arguments(parser)
    parser.add_argument("--trials", type=int, default=24, help="default 24")
    parser.add_argument("--out", type=Path, default=DOCS / "pruned_search.json")
    chosen = parser.parse_args()
    default = PrunerConfig()
    if (chosen.work / chosen.search / "pruned").exists():
        raise SystemExit(
            f"{chosen.work / chosen.search / 'pruned'} is there already: name another --work, or delete it"
        )
    pruned = search(chosen.search, chosen, run="pruned", **{"hpo.pruner.name": default.name})
    whole = search(chosen.search, chosen)
    sign = 1.0 if whole.direction == optuna.study.StudyDirection.MAXIMIZE else -1.0
    first, again = whole.trials[: chosen.trials], {point_of(trial): trial for trial in pruned.trials}
    if [trial.params for trial in first] != [again[point].params for point in sorted(again)]:
        raise SystemExit("the two searches did not try the same points")
    figures = {"unpruned": describe(first, sign), "pruned": describe(pruned.trials, sign)}
    record = {
        "written": time.strftime("%Y-%m-%d"),
        "git_commit": git_commit(),
        "hardware": hardware(),
        "versions": versions(),
        "search": chosen.search,
        "pruner": default.name,
        "share": figures["pruned"]["cpu_seconds"] / figures["unpruned"]["cpu_seconds"],
        **figures,
    }
    write_json(chosen.out, record)
    rows = [
        [
            name,
            f["points"],
            f["complete"],
            f["reports"],
            f"{f['cpu_seconds']:.0f}",
            f"{f['outside_seconds']:.0f}",
            f"{f['best_value']:.4f}",
            ", ".join(f"{score:.3f}" for score in f["fold_scores"]),
        ]
        for name, f in figures.items()
    ]
    text = (
        f"# A search with and without pruning: {chosen.search}\n\n"
        f"Written {record['written']} at commit {record['git_commit']} by `examples/benchmarks/pruned_search.py`, on "
        f"{record['hardware']['cpu']}, {record['hardware']['threads']} thread. The pruner is the default, "
        f"`{default.name}`. Both searches try the same {chosen.trials} points.\n\n"
        + markdown_table(["", "points", "complete", "reports", "CPU seconds", "outside", "best", "its folds"], rows)
        + f"\n\nThe pruned search takes {record['share']:.1%} of the other's seconds.\n"
    )
    write_text(chosen.out.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
