"""What a study ends with: the best hyperparameters, the model refitted with them, and their metrics."""

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import yaml
from lightning.pytorch import Callback
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.errors import StudyError
from lightning_bge.hpo.progress import count, ended_early, finished
from lightning_bge.hpo.ranking import cost_of, front, ranked, score_of
from lightning_bge.hpo.seed_replicates import SeedReplicates, describe_seed_replicates
from lightning_bge.hpo.trial.objective import Build, StopOnRequest, TrialSetup
from lightning_bge.hpo.trial.out_of_fold import (
    HAS_THRESHOLD,
    OutOfFold,
    drop_predictions,
    judge_out_of_fold,
    majority_baseline,
    predictions_file,
)
from lightning_bge.hpo.trials import (
    COMPUTED_WITH,
    ENDED,
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
from lightning_bge.hpo.versions import count_versions, describe_versions
from lightning_bge.models.metrics import MonitorConfig
from lightning_bge.models.prediction_file import write_predictions
from lightning_bge.runtime.memory import release
from lightning_bge.runtime.run_folder import read_json, write_json, write_text
from lightning_bge.runtime.stop import StopRequest
from lightning_bge.types import Schema


def finish_study(
    study: optuna.Study,
    run_dir: Path,
    *,
    build: Build,
    monitor: MonitorConfig,
    epochs: int,
    refit: bool,
    replicates: SeedReplicates | None = None,
    request: StopRequest | None = None,
) -> dict[str, Any]:
    """Write `best.yaml`, `trials.csv`, `oof.csv`, the exported model and `summary.json`; return the summary.

    The best trial is the winner of the seed replicates, where there are any, else the one with the best score. A study
    that was finished before with the same trials is not refitted, and its test file is not scored a second time.

    Args:
        study: all its trials have ended.
        run_dir: the run's folder.
        build: makes fresh objects from parameters.
        monitor: the metric of the study.
        epochs: of a trial that has not drawn a number of them.
        refit: whether a model is trained on all rows and exported.
        replicates: results of the seed replicates.
        request: whether to stop the refit.

    Raises:
        StudyError: no trial ran to its end.
        Stopped: as requested; the next call does what is missing.
    """
    _check_any_complete(study, run_dir)
    best = ranked(study)[0] if replicates is None else study.get_trials(deepcopy=False)[replicates.winner]
    write_text(run_dir / "trials.csv", trials_table(study))
    setup = build(best.params)
    key: dict[str, Any] = {
        "n_trials": finished(study),
        "n_runs": count(study, *ENDED, TrialState.FAIL),  # a paused trial and the one that resumes it are two
        "best_trial": best.number,
        "refit": refit,
        "test_file": setup.datamodule.test_file,
        "seed_replicates": None if replicates is None else replicates.as_dict(),
    }
    known = read_json(run_dir / "summary.json")
    if known is not None and all(known.get(name) == value for name, value in key.items()):
        return known
    schema = setup.datamodule.schema
    assert schema is not None
    drop_predictions(study, run_dir / "oof")
    oof = judge_out_of_fold(predictions_file(run_dir / "oof", best.number), schema, str(monitor.metric))
    schema = replace(schema, threshold=oof.threshold)
    write_predictions(run_dir / "oof.csv", schema, oof.predictions, {"fold": oof.fold.tolist()})
    write_text(run_dir / "best.yaml", _best_yaml(setup, best, run_dir))
    summary = _summary(study, best, monitor, schema, oof) | key
    if refit:  # with the learning rate's schedule of the folds, to the epoch at which they were best on average
        schedule = {"model.schedule.epochs": best.params.get("trainer.max_epochs", epochs)}
        callbacks = [] if request is None else [StopOnRequest(request)]
        summary |= _refit(build, best.params | schedule, schema, summary["refit_epochs"], run_dir, callbacks)
    write_json(run_dir / "summary.json", summary)
    return summary


def _check_any_complete(study: optuna.Study, run_dir: Path) -> None:
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


def _best_yaml(setup: TrialSetup, best: FrozenTrial, run_dir: Path) -> str:
    config = {**setup.config(), "run_dir": str(run_dir / "fit")}
    head = f"# The best hyperparameters of the study {run_dir.name}, those of trial {best.number}\n"
    return head + "# Train with them: lightning-bge fit -c THIS_FILE\n" + yaml.safe_dump(config, sort_keys=False)


def _summary(
    study: optuna.Study, best: FrozenTrial, monitor: MonitorConfig, schema: Schema, oof: OutOfFold
) -> dict[str, Any]:
    failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    n_failed = sum(has_failed(tries) for tries in attempts(study.get_trials(deepcopy=False)).values())
    found: dict[str, Any] = {
        "study": study.study_name,
        "task": schema.task,
        "n_complete": count(study, TrialState.COMPLETE),
        "n_pruned": len(ended_early(study)),
        "n_out_of_memory": sum("oom_where" in trial.user_attrs for trial in study.get_trials(deepcopy=False)),
        "n_failed": n_failed,
        "n_interrupted": sum(bool({WORKER_LOST, INTERRUPTED} & trial.user_attrs.keys()) for trial in failed),
        "metric": monitor.metric,
        "objective": monitor.objective,
        "best_value": score_of(best),
        "majority_baseline": majority_baseline(schema, oof.predictions, str(monitor.metric)),
        "best_trial": best.number,
        "best_params": best.params,
        "fold_scores": best.user_attrs["fold_scores"],
        "fold_epochs": best.user_attrs["fold_epochs"],
        "threshold": oof.threshold if schema.task in HAS_THRESHOLD else None,
        "threshold_note": oof.threshold_note,
        "out_of_fold": oof.metrics,
        "refit_epochs": max(1, round(float(np.mean(best.user_attrs["fold_epochs"])))),  # the mean of the scored epochs
        "wall_seconds": round(wall_seconds(study), 1),
        "computed_with": count_versions(study),
        "model_dir": None,
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


def _refit(
    build: Build, params: dict[str, Any], schema: Schema, epochs: int, run_dir: Path, callbacks: Sequence[Callback]
) -> dict[str, Any]:
    """Train with the hyperparameters on all rows for so many epochs; export the model; score the test file."""
    setup = build(params)
    model, datamodule = setup.model, setup.datamodule
    try:
        datamodule.select_fold(None)
        trainer = setup.make_trainer(callbacks=callbacks, max_epochs=epochs, limit_val_batches=0)
        trainer.fit(model, datamodule=datamodule)
        assert model.schema is not None
        model.set_schema(replace(model.schema, threshold=schema.threshold))
        folder = model.export(run_dir / "model", datamodule.new_tokenizer())
        found: dict[str, Any] = {"model_dir": str(folder)}
        if datamodule.test_file is not None:
            trainer.test(model, datamodule=datamodule, verbose=False)
            assert model.predictions is not None
            write_predictions(run_dir / "test.csv", model.schema, model.predictions)
            metrics = trainer.callback_metrics
            found["test"] = {name.removeprefix("test_"): float(value) for name, value in metrics.items()}
    finally:
        release(host=False)
    return found


def describe_study(run_dir: Path, summary: dict[str, Any]) -> str:
    """What a user reads at the end of a study: the metrics, the files, and what they are for."""
    metric = summary["metric"]
    baseline = "mean of the labels" if summary["task"] == "regression" else "majority class"
    lines = [
        "",
        f"study {summary['study']}: {summary['n_complete']} trials complete, {summary['n_pruned']} pruned, "
        f"{summary['n_failed']} failed, {summary['wall_seconds']:.0f} s",
    ]
    if summary["n_out_of_memory"]:
        lines.append(f"{summary['n_out_of_memory']} of the pruned trials ran out of memory (trials.csv: oom_)")
    lines += describe_versions(summary["computed_with"])
    lines += [
        f"best {metric} {summary['best_value']:.4f} (trial {summary['best_trial']}, mean over folds; "
        f"{baseline}: {summary['majority_baseline']:.4f})",
        *(f"  {name}: {value}" for name, value in summary["best_params"].items()),
    ]
    if summary["seed_replicates"]:
        lines += describe_seed_replicates(summary["seed_replicates"], metric)
    if "front" in summary:
        lines.append(f"Pareto front of {metric} and {summary['cost']}:")
        lines += [f"  trial {one['number']}: {one['score']:.4f}, {one['cost']:.4g} s" for one in summary["front"]]
    if metric in summary["out_of_fold"]:
        lines.append(f"out-of-fold {metric} {summary['out_of_fold'][metric]:.4f}")
    if summary["threshold"] is not None:
        lines.append(f"threshold {summary['threshold']:.3f}: {summary['threshold_note']}")
    if summary["model_dir"]:
        epochs = f"{summary['refit_epochs']} epoch{'s'[: summary['refit_epochs'] > 1]}"
        lines.append(f"refitted on all rows for {epochs}, the mean of the folds' best ones")
    if metric in summary.get("test", {}):
        lines.append(f"test file, scored once: {metric} {summary['test'][metric]:.4f}")
    files = {
        "summary.json": "these results",
        "best.yaml": "the best hyperparameters, for lightning-bge fit",
        "trials.csv": "all trials",
        "oof.csv": "out-of-fold predictions",
        "run.json": "how to repeat the study",
        "journal.log": "the study's storage",
    }
    if summary["model_dir"]:
        files["model/"] = "the exported model, for transformers and sentence-transformers"
    return "\n".join([*lines, "", f"{run_dir}/", *(f"  {name:<14}{text}" for name, text in files.items())])
