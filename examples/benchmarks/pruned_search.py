"""One search twice, unpruned and with the product's default pruner: what is spent, and what is found.

    python examples/benchmarks/pruned_search.py trecqa --data FOLDER --model FOLDER --trials 24
    python examples/benchmarks/pruned_search.py sample --trials 40 --sampler tpe --seeds 1 2 3 --out tpe.json

With `--sampler random` both try the same parameter sets. An interrupted search is refused: it repeats work when it is
continued. Of a search that `record_searches.py` recorded in the same folder, with as many trials or more, the first
ones count as the unpruned search. Seconds are the process's CPU seconds of the reports that were made, training and
validation, as on a machine that does other work as well wall time is no measure. What is outside of them (building,
checkpoints, storage) is given in wall seconds, all trials together.
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

from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Report
from lightning_bge.hpo.trials import latest_trials, parameter_set_of
from lightning_bge.runtime.run_folder import write_json, write_text

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
    latest = latest_trials(trials)
    done = [trial for trial in latest.values() if trial.state == TrialState.COMPLETE]
    best = max(done, key=lambda trial: sign * trial.value)
    scores = best.user_attrs["fold_scores"]
    return {
        "parameter_sets": len(latest),
        "complete": len(done),
        "reports": sum(len(trial.intermediate_values) for trial in latest.values()),
        "cpu_seconds": sum(r.train_cpu + r.val_cpu for trial in latest.values() for r in reports_of(trial)),
        "outside_seconds": outside(trials, list(latest.values())),
        "best_value": best.value,
        "best_params": best.params,
        "fold_scores": scores,
        "standard_error": float(np.std(scores, ddof=1) / len(scores) ** 0.5),
    }


def pair(chosen: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Both searches with one seed of the sampler."""
    recorded = chosen.sampler == "random" and seed == 42
    names = (
        ("pruned", "study") if recorded else tuple(f"{name}-{chosen.sampler}-{seed}" for name in ("pruned", "whole"))
    )
    if (chosen.work / chosen.search / names[0]).exists():
        raise SystemExit(
            f"{chosen.work / chosen.search / names[0]} is there already: name another --work, or delete it"
        )
    more = {"hpo.sampler.name": chosen.sampler, "hpo.sampler.seed": seed}
    pruned = search(chosen.search, chosen, run=names[0], **more, **{"hpo.pruner.name": PrunerConfig().name})
    whole = search(chosen.search, chosen, run=names[1], **more)
    sign = 1.0 if whole.direction == optuna.study.StudyDirection.MAXIMIZE else -1.0
    first, resumed = whole.trials[: chosen.trials], {parameter_set_of(trial): trial for trial in pruned.trials}
    same = [trial.params for trial in first] == [resumed[number].params for number in sorted(resumed)]
    if chosen.sampler == "random" and not same:
        raise SystemExit("the two searches did not try the same parameter sets")
    found = {"seed": seed, "unpruned": describe(first, sign), "pruned": describe(pruned.trials, sign)}
    return {**found, "share": found["pruned"]["cpu_seconds"] / found["unpruned"]["cpu_seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("search", choices=list(SEARCHES))
    add_arguments(parser)
    parser.add_argument("--trials", type=int, default=24, help="default 24")
    parser.add_argument("--sampler", choices=("random", "tpe"), default="random", help="default random")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="of the sampler; default 42")
    parser.add_argument("--out", type=Path, default=DOCS / "pruned_search.json")
    chosen = parser.parse_args()
    record = {
        "written": time.strftime("%Y-%m-%d"),
        "git_commit": git_commit(),
        "hardware": hardware(),
        "versions": versions(),
        "options": {name: getattr(chosen, name) for name in ("search", "trials", "sampler", "seeds")},
        "pruner": PrunerConfig().name,
        "pairs": [pair(chosen, seed) for seed in chosen.seeds],
    }
    write_json(chosen.out, record)
    write_text(chosen.out.with_suffix(".md"), text := note(record))
    print(text)


def note(record: dict[str, Any]) -> str:
    """The Markdown beside the JSON."""
    options, rows = record["options"], []
    for found in record["pairs"]:
        for name in ("unpruned", "pruned"):
            f = found[name]
            share = f"{found['share']:.1%}" if name == "pruned" else ""
            folds = ", ".join(f"{score:.3f}" for score in f["fold_scores"])
            seconds = (f"{f['cpu_seconds']:.0f}", share, f"{f['outside_seconds']:.0f}")
            rows.append([found["seed"], name, f["complete"], f["reports"], *seconds, f"{f['best_value']:.4f}", folds])
    header = ["seed", "", "complete", "reports", "CPU seconds", "share", "outside", "best", "by fold"]
    sets = "the same parameter sets" if options["sampler"] == "random" else "parameter sets of its own"
    return (
        f"# With and without pruning: {options['search']}, {options['trials']} trials, sampler {options['sampler']}\n\n"
        f"Written {record['written']} at commit {record['git_commit']} by `examples/benchmarks/pruned_search.py`, on "
        f"{record['hardware']['cpu']}, {record['hardware']['threads']} thread. The pruner is the default, "
        f"`{record['pruner']}`; each search tries {sets}.\n\n{markdown_table(header, rows)}\n"
    )


if __name__ == "__main__":
    main()
