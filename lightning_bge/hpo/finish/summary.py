"""What is written of any study: its trials as a table, the best hyperparameters, and the counts of the summary."""

import csv
import io
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.errors import StudyError
from lightning_bge.hpo.progress import count, ended_early
from lightning_bge.hpo.ranking import cost_of, front, score_of
from lightning_bge.hpo.trial.score import Monitor
from lightning_bge.hpo.trial.setup import TrialSetup
from lightning_bge.hpo.trials import (
    COMPUTED_WITH,
    ERROR,
    INTERRUPTED,
    NOT_TRAINED,
    PARAMETER_SET,
    RESUMES,
    RETRY_OF,
    WORKER_LOST,
    attempts,
    has_failed,
)
from lightning_bge.hpo.versions import count_versions

# keys of a summary that only predictions and an export fill
NOT_KNOWN: dict[str, Any] = {
    **dict.fromkeys(("task", "metric_class", "positive_label", "majority_baseline", "threshold", "threshold_note")),
    **dict.fromkeys(("out_of_fold", "model_dir", "refit", "ensemble", "calibration", "nested", "estimate")),
    "warnings": [],
}


def check_any_complete(study: optuna.Study, run_dir: Path) -> None:
    """Raise `StudyError` where no trial ran to its end."""
    if count(study, TrialState.COMPLETE) == 0:
        raise StudyError(
            f"{run_dir}: none of {len(study.trials)} trials ran to its end, so that there is no best one. Continue the "
            "study with a longer hpo.timeout or more hpo.n_trials, or prune less (hpo.pruner)"
        )


def trials_table(study: optuna.Study) -> str:
    """All trials as CSV: number, state, value, cost, seconds, reports, where they ended, folds' scores, parameters."""
    names = sorted({name for trial in study.get_trials(deepcopy=False) for name in trial.params})
    attributes = [
        *("pruned_at", "paused_at", RESUMES, "oom_where", "oom_requested", "oom_free"),
        *("fold_scores", "fold_epochs", PARAMETER_SET, RETRY_OF, WORKER_LOST, INTERRUPTED, ERROR, NOT_TRAINED),
        COMPUTED_WITH,
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")  # it writes None as an empty field
    writer.writerow(["number", "state", "value", "cost", "seconds", "reports", *attributes, *names])
    for trial in study.get_trials(deepcopy=False):
        seconds = round(trial.duration.total_seconds(), 3) if trial.duration else None
        row = [trial.number, trial.state.name, score_of(trial), cost_of(trial), seconds, len(trial.intermediate_values)]
        writer.writerow(row + [trial.user_attrs.get(name) for name in attributes] + [*map(trial.params.get, names)])
    return text.getvalue()


def best_yaml(setup: TrialSetup, best: FrozenTrial, run_dir: Path) -> str:
    """The content of `best.yaml`: the options of the best trial, for `lightning-bge fit`."""
    config = setup.config()
    head = f"# The best hyperparameters of the study {run_dir.name}, those of trial {best.number}\n"
    if "trainer" not in config:  # a function has made the module
        return head + yaml.safe_dump(config, sort_keys=False)
    head += "# Train with them: lightning-bge fit -c THIS_FILE\n"
    return head + yaml.safe_dump({**config, "run_dir": str(run_dir / "fit")}, sort_keys=False)


def study_summary(study: optuna.Study, best: FrozenTrial, monitor: Monitor) -> dict[str, Any]:
    """What the summary of any study has: its trials, and the best of them."""
    failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    n_failed = sum(has_failed(tries) for tries in attempts(study.get_trials(deepcopy=False)).values())
    found: dict[str, Any] = {
        "study": study.study_name,
        "n_complete": count(study, TrialState.COMPLETE),
        "n_pruned": len(ended_early(study)),
        "n_out_of_memory": sum("oom_where" in trial.user_attrs for trial in study.get_trials(deepcopy=False)),
        "n_failed": n_failed,
        "n_interrupted": sum(bool({WORKER_LOST, INTERRUPTED} & trial.user_attrs.keys()) for trial in failed),
        "metric": monitor.name,
        "objective": monitor.objective,
        "sampler": study.user_attrs["methods"]["hpo.sampler"]["name"],
        "best_value": score_of(best),
        "best_trial": best.number,
        "best_params": best.params,
        "fold_scores": best.user_attrs["fold_scores"],
        "fold_epochs": best.user_attrs["fold_epochs"],
        "wall_seconds": round(wall_seconds(study), 1),
        "computed_with": count_versions(study),
        **NOT_KNOWN,
    }
    if len(study.directions) == 1:
        return found
    optimal = [
        {"number": trial.number, "score": score_of(trial), "cost": cost_of(trial), "params": trial.params}
        for trial in front(study)
    ]
    return {**found, "cost": study.user_attrs["settings"]["hpo.cost"], "front": optimal}


def wall_seconds(study: optuna.Study) -> float:
    """Seconds in which at least one trial was running, of all processes and calls together."""
    spans = sorted(
        (trial.datetime_start, trial.datetime_complete)
        for trial in study.get_trials(deepcopy=False)
        if trial.datetime_start and trial.datetime_complete
    )
    total, end = 0.0, datetime.min
    for start, stop in spans:
        total += max(0.0, (stop - max(start, end)).total_seconds())
        end = max(end, stop)
    return total
