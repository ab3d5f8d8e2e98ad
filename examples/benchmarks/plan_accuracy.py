"""How accurate `plan` is, and the time left that a study prints: both against the wall clock.

    OMP_NUM_THREADS=2 python examples/benchmarks/plan_accuracy.py --data FOLDER

Each study is `lightning-bge plan`, then `lightning-bge hpo`, each in its own process; run nothing else.
First studies without pruning, then with the default pruner and other seeds. Compared with the wall time of the whole
command, from the start of its process to its end, are the plan's hours and their interval; for pruned studies also
what the plan's measurement gives for the reports that the trials really made; and the time left that was printed when
a third of the trials had ended. A study that is in the record is not run a second time, so that the same command
resumes an interrupted benchmark. With --predict-only nothing is run: the measurements of the recorded plans are
used for new predictions by the present code. FOLDER holds `rte/train.tsv`; with --train, --columns and --label it
may be any other file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import add_shared_arguments, packaged_weights, write_record
from note import table, write_note

from lightning_bge.advisor.plan.cost_model import Calibration, MeasuredTrial, ParameterSets, TrialCost
from lightning_bge.advisor.plan.plan import DRAWN
from lightning_bge.advisor.plan.predict import Scenario, StudyCosts, predict
from lightning_bge.hpo.analysis.history import History, history_of
from lightning_bge.hpo.analysis.journal import load_study
from lightning_bge.hpo.pruning.config import PrunerConfig, rungs
from lightning_bge.hpo.pruning.halving import Halving
from lightning_bge.hpo.space.parameter_sets import draw_parameter_sets
from lightning_bge.hpo.space.search_space import Space, parse_space
from lightning_bge.hpo.steps import Steps
from lightning_bge.runtime.run_folder import read_json

SPACE = """{
    model.optimizer.lr: {low: 1.0e-5, high: 3.0e-4, log: true},
    model.dropout: {choices: [0.0, 0.1]},
    data.batch_size: {choices: [16, 32]}
}"""
OUT = "docs/benchmarks/plan_accuracy.json"
UNPRUNED = ({"folds": 1, "rows": 1.5}, {"folds": 2, "rows": 1.0}, {"folds": 1, "rows": 1.25})  # rows: times --rows
EPOCHS, PRUNED_FOLDS = 2, 2
TIME_LEFT = re.compile(r"about (\S+) left(?: \((\S+) to (\S+)\))?$")


def options(given: argparse.Namespace, folds: int, rows: float, seed: int, pruner: str, run_dir: Path) -> list[str]:
    """The options of one study."""
    named = {
        "run_dir": run_dir,
        "model.name_or_path": given.model,
        "data.train_file": Path(given.data, given.train),
        "data.text_columns": given.columns,
        "data.label_column": given.label,
        "data.cache_dir": Path(given.work, "cache"),
        "data.table.max_rows": round(rows * given.rows),
        "data.split.folds": folds,
        "trainer.max_epochs": EPOCHS,
        "hpo.n_trials": given.trials,
        "hpo.space": SPACE,
        "hpo.baseline": "false",
        "hpo.sampler.seed": seed,
        "hpo.pruner.name": pruner,
    }
    return [word for name, value in named.items() for word in (f"--{name}", str(value))]


def run(command: str, flags: list[str]) -> tuple[float, float, list[tuple[float, str]]]:
    """Run the program; when it began and ended, and each line of its output with the time at which it came."""
    words = [sys.executable, "-m", "lightning_bge.cli", command, *flags]
    began, lines = time.time(), []
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as one:
        assert one.stdout is not None
        for line in one.stdout:
            lines.append((time.time(), line.rstrip()))
    if one.returncode:
        raise SystemExit(f"{command} ended with status {one.returncode}: {' '.join(words)}")
    return began, time.time(), lines


def study(given: argparse.Namespace, name: str, folds: int, rows: float, seed: int, pruner: str) -> dict[str, Any]:
    """Plan one study, run it, and compare."""
    run_dir = Path(given.work, name)
    shutil.rmtree(run_dir, ignore_errors=True)  # of a study that was cut off
    flags = options(given, folds, rows, seed, pruner, run_dir)
    plan_file = Path(given.work, f"{name}-plan.json")
    began, ended, _ = run("plan", [*flags, "--seconds", str(given.seconds), "--json", str(plan_file)])
    planned = read_json(plan_file)
    assert planned is not None
    found = {"folds": folds, "rows": round(rows * given.rows), "seed": seed, "pruner": pruner}
    found |= {"plan_took": ended - began, "warnings": planned["warnings"]}
    found |= {name: planned["prediction"][name] for name in ("low", "mid", "high")}
    began, ended, lines = run("hpo", flags)
    found["wall"] = ended - began
    return found | {"given_reports": given_reports(run_dir, planned), "left": time_left(lines, ended)}


def load_calibration(plain: dict[str, Any]) -> Calibration:
    """The calibration of a plan's JSON."""
    trials = [MeasuredTrial(**{**trial, "cost": TrialCost(**trial["cost"])}) for trial in plain["trials"]]
    return Calibration(**{**plain, "trials": tuple(trials)})


def predict_recorded(given: argparse.Namespace, one: dict[str, Any], planned: dict[str, Any]) -> dict[str, float]:
    """A new prediction by the present code, from the measurement of a recorded plan."""
    space = parse_space(yaml.safe_load(SPACE))
    sets = ParameterSets(space, draw_parameter_sets(space, [], DRAWN), EPOCHS)
    costs = StudyCosts.of(load_calibration(planned["calibration"]), sets)
    found = predict(Scenario(given.trials, Steps(one["folds"], EPOCHS), PrunerConfig(one["pruner"])), costs)
    return {name: getattr(found, name) for name in ("low", "mid", "high")}


def given_reports(run_dir: Path, planned: dict[str, Any]) -> float:
    """Seconds that the plan's measurement gives for the reports that the trials really made."""
    asked = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))["hpo"]
    loaded, summary = load_study(run_dir), read_json(run_dir / "summary.json")
    assert loaded is not None
    assert summary is not None
    known, pruner = load_calibration(planned["calibration"]), PrunerConfig(**asked["pruner"])
    refit = summary["refit"] or {"epochs": 0}
    return seconds_of(known, parse_space(asked["space"]), pruner, history_of(*loaded, asked), refit["epochs"])


def seconds_of(
    calibration: Calibration, space: Space, pruner: PrunerConfig, history: History, refit_epochs: int
) -> float:
    """Wall-clock seconds that a calibration gives for a finished study of one worker.

    Args:
        calibration: measured before the study.
        space: the search space.
        pruner: of the study.
        history: of the study.
        refit_epochs: epochs of the refit; 0: there was none.
    """
    steps, sign = history.steps, 1.0 if history.goal.direction == "maximize" else -1.0
    total = calibration.start + calibration.first_trial + calibration.end + calibration.refit_epoch * refit_epochs
    at = rungs(pruner, steps)[0] if pruner.name == "asha" else []
    parameter_sets = len({trial.number for trial in history.trials if trial.resumes is None})
    halving = Halving(len(at), pruner.reduction_factor)
    for trial in history.trials:
        cost = calibration.cost(trial.params, space, steps.epochs)
        start = 0 if trial.resumes is None else history.trials[trial.resumes].last_step
        end = steps.total if trial.outcome == "complete" else trial.last_step
        trained = {report.step for fold in trial.curve for report in fold}
        total += cost.start + math.fsum(cost.reports(steps, [n + 1 in trained for n in range(steps.total)])[start:end])
        total += (start % steps.per_fold > 0) * (cost.resume + cost.fold)
        for rung, step in enumerate(at):
            if start < step <= end:
                halving.add(trial.number, rung, sign * trial.values[step], paused=True)
                paused = trial.outcome in ("paused", "resumed") and step == end
                written = paused and halving.can_be_resumed(trial.number, parameter_sets)
                total += (written and step % steps.per_fold > 0) * cost.pause
    return total


def time_left(lines: list[tuple[float, str]], ended: float) -> dict[str, float]:
    """The time left that was printed after a third of the trials' lines, and that which was really left."""
    shown = [(at, found) for at, line in lines if line.startswith("[") and (found := TIME_LEFT.search(line))]
    at, found = shown[(len(shown) - 1) // 3]
    mid, low, high = (seconds(text or found[1]) for text in found.groups())
    return {"low": low, "mid": mid, "high": high, "true": ended - at}


def seconds(text: str) -> float:
    """Of `1:02:03`."""
    hours, minutes, rest = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + int(rest)


def studies(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All studies by their names."""
    todo = {
        f"unpruned-{number}": {**kind, "seed": 42, "pruner": "none"}
        for number, kind in enumerate(UNPRUNED[: given.unpruned], start=1)
    }
    pruned = {"folds": PRUNED_FOLDS, "rows": 1.0, "pruner": PrunerConfig().name}
    return todo | {f"pruned-{seed}": {**pruned, "seed": seed} for seed in range(1, given.pruned + 1)}


def judge(done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Errors as shares of the wall time, and whether the intervals contain it."""
    unpruned = [one for one in done.values() if one["pruner"] == "none"]
    pruned = [one for one in done.values() if one["pruner"] != "none"]
    left = [one["left"] for one in done.values()]

    def within(one: dict[str, float], truth: float) -> bool:
        return one["low"] <= truth <= one["high"]

    return {
        "unpruned": [one["mid"] / one["wall"] - 1 for one in unpruned],
        "pruned_in_interval": [within(one, one["wall"]) for one in pruned],
        "pruned_given_reports": [one["given_reports"] / one["wall"] - 1 for one in pruned],
        "left": [one["mid"] / one["true"] - 1 for one in left],
        "left_in_interval": [within(one, one["true"]) for one in left],
    }


def sections(done: dict[str, dict[str, Any]], verdict: dict[str, Any]) -> list[str]:
    """The note's tables."""
    rows, left = [], []
    for name, one in done.items():
        off, given = (f"{one[key] / one['wall'] - 1:+.1%}" for key in ("mid", "given_reports"))
        hours = (one["mid"], f"{one['low']:.0f} to {one['high']:.0f}", one["wall"], off, given)
        rows.append([name, one["folds"], one["rows"], *hours])
        one = one["left"]
        off = f"{one['mid'] / one['true'] - 1:+.1%}"
        left.append([name, one["mid"], f"{one['low']:.0f} to {one['high']:.0f}", one["true"], off])
    header = ["study", "folds", "rows", "planned s", "interval", "wall s", "error", "error given the reports"]
    lines = []
    if verdict["unpruned"]:
        lines.append(f"without pruning, the largest error is {np.abs(verdict['unpruned']).max():.1%}")
    if verdict["pruned_in_interval"]:
        inside, count = sum(verdict["pruned_in_interval"]), len(verdict["pruned_in_interval"])
        lines.append(f"with pruning, the interval contains the wall time in {inside} of {count} studies")
        largest = np.abs(verdict["pruned_given_reports"]).max()
        lines.append(f"given the reports that the pruned trials made, the largest error is {largest:.1%}")
    inside, count = sum(verdict["left_in_interval"]), len(verdict["left_in_interval"])
    lines.append(
        f"after a third of the trials, the interval of the time left contains it in {inside} of {count} studies"
    )
    return [
        "\n".join(f"- {line}" for line in lines),
        "## Plans\n\nThe interval has a confidence of 80 %.\n\n" + table(header, rows),
        "## The time left, after a third of the trials\n\n"
        + table(["study", "printed s", "interval", "real s", "error"], left),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_arguments(parser, OUT, None)
    parser.add_argument("--train", default="rte/train.tsv", help="rows, in the data's folder (default: %(default)s)")
    parser.add_argument("--columns", default="[sentence1, sentence2]", help="the texts' (default: %(default)s)")
    parser.add_argument("--label", default="label", help="column (default: %(default)s)")
    parser.add_argument(
        "--rows", type=int, default=200, help="the first so many, times 1 to 1.5 (default: %(default)s)"
    )
    parser.add_argument("--trials", type=int, default=12, help="of each study (default: %(default)s)")
    parser.add_argument("--unpruned", type=int, default=len(UNPRUNED), help="how many (default: %(default)s)")
    parser.add_argument("--pruned", type=int, default=10, help="how many (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of the measurement of a plan (default: %(default)s)"
    )
    parser.add_argument("--work", default="runs/plan_accuracy", help="folder of the studies (default: %(default)s)")
    parser.add_argument("--predict-only", action="store_true", help="only repeat the predictions of recorded plans")
    given = parser.parse_args()
    given.model = packaged_weights() if given.model is None else given.model
    Path(given.work).mkdir(parents=True, exist_ok=True)
    done = (read_json(Path(given.out)) or {}).get("studies", {})
    todo = studies(given)
    for name, kind in todo.items():
        if (name in done) != given.predict_only:
            continue
        if given.predict_only:
            done[name] |= predict_recorded(given, done[name], read_json(Path(given.work, f"{name}-plan.json")) or {})
        else:
            done[name] = study(given, name, **kind)
        print(json.dumps({name: done[name]}), flush=True)
        verdict = judge(done)
        shown = argparse.Namespace(**{key: value for key, value in vars(given).items() if key != "work"})
        write_record(given.out, "plan_accuracy", shown, {"studies": done, "verdict": verdict})
        write_note(given.out, "Accuracy of plans and of the time left", sections(done, verdict))


if __name__ == "__main__":
    main()
