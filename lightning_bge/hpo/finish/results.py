"""What a study ends with: the best hyperparameters, the model refitted with them, and their metrics."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.hpo.analysis.exported import describe_exported
from lightning_bge.hpo.analysis.winner import describe_scores
from lightning_bge.hpo.config import PREDICTIONS, StudyConfig
from lightning_bge.hpo.evaluation.candidates import Target
from lightning_bge.hpo.evaluation.resampling import ValidationRows
from lightning_bge.hpo.evaluation.study_estimate import Kept, estimate_study
from lightning_bge.hpo.finish import baseline as baselines
from lightning_bge.hpo.finish import seed_replicates
from lightning_bge.hpo.finish.calibration import calibrate_out_of_fold
from lightning_bge.hpo.finish.ensemble import export_ensemble
from lightning_bge.hpo.finish.published import fetch_results
from lightning_bge.hpo.finish.refit import Winner, refit
from lightning_bge.hpo.finish.seed_replicates import SeedReplicates, describe_seed_replicates
from lightning_bge.hpo.finish.summary import best_yaml, check_any_complete, study_summary, trials_table
from lightning_bge.hpo.progress import count, finished
from lightning_bge.hpo.ranking import ranked, score_of
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.storage.files import study_files
from lightning_bge.hpo.storage.journal import JOURNAL
from lightning_bge.hpo.trial.out_of_fold import (
    OutOfFold,
    drop_predictions,
    judge_out_of_fold,
    predictions_file,
)
from lightning_bge.hpo.trial.text_setup import TextBuild
from lightning_bge.hpo.trials import (
    ENDED,
)
from lightning_bge.hpo.versions import describe_versions
from lightning_bge.models.metrics.config import MonitorConfig
from lightning_bge.models.metrics.constants import majority_baseline, warn_of_constants
from lightning_bge.models.metrics.names import HAS_THRESHOLD
from lightning_bge.models.output.prediction_file import write_predictions
from lightning_bge.runtime.locations import Location, local_folder
from lightning_bge.runtime.run_folder import read_json, write_json, write_text
from lightning_bge.runtime.stop import StopRequest
from lightning_bge.types import Schema, Task

EXPORTED = ("model_dir", "refit", "ensemble", "test")  # of the summary: what the refit has given


def finish_study(
    study: optuna.Study,
    run_dir: Path,
    *,
    build: TextBuild,
    monitor: MonitorConfig,
    epochs: int,
    config: StudyConfig,
    replicates: SeedReplicates | None = None,
    baseline: tuple[FrozenTrial, Steps] | None = None,
    nested: dict[str, Any] | None = None,
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
        config: whether a model is trained on all rows and exported, and on which rows.
        replicates: results of the seed replicates.
        baseline: the trial of the configured options, and its steps.
        nested: results of the nested cross-validation; None: there is none, or what the summary has is kept.
        request: whether to stop the refit.

    Raises:
        StudyError: no trial ran to its end.
        Stopped: as requested; the next call does what is missing.
    """
    check_any_complete(study, run_dir)
    best = ranked(study)[0] if replicates is None else study.get_trials(deepcopy=False)[replicates.winner]
    write_text(run_dir / "trials.csv", trials_table(study))
    setup = build(best.params)
    key = _key(study, best, config, setup.datamodule.test_file, replicates)
    baseline_score = None if baseline is None else score_of(baseline[0])
    files = study_files(config.files, run_dir)
    known = _known_summary(run_dir, files, key, nested)
    if known is not None and known["baseline"] == baseline_score:
        return known
    schema = setup.datamodule.schema
    assert schema is not None
    drop_predictions(study, files / "oof")
    path = predictions_file(files / "oof", best.number)
    calibration = None if config.calibration is None else calibrate_out_of_fold(path, schema.task)
    temperature = 1.0 if calibration is None else calibration.temperature
    oof = judge_out_of_fold(path, schema, monitor, temperature)
    schema = replace(schema, threshold=oof.threshold)
    write_predictions(run_dir / "oof.csv", schema, oof.predictions, {"fold": oof.fold.tolist()})
    write_text(run_dir / "best.yaml", best_yaml(setup, best, run_dir))
    summary = study_summary(study, best, monitor) | _judged(best, monitor, schema, oof)
    summary |= key | {"nested": nested, "baseline": baseline_score}
    summary["calibration"] = None if calibration is None else calibration.as_dict()
    if known is not None:  # the same model: its test file was scored
        summary |= {name: known[name] for name in (*EXPORTED, "nested") if name in known}
    elif config.refit:
        winner = Winner(trial=best, build=build, epochs=epochs, schema=schema, temperature=temperature, request=request)
        summary |= export_ensemble(winner, run_dir) if config.ensemble else refit(winner, config, run_dir)
    # last: the model is exported by then, whatever the estimate of a large study takes
    summary["estimate"] = _estimate(study, files / PREDICTIONS, monitor, schema.task, oof, replicates, baseline, best)
    write_json(run_dir / "summary.json", summary)
    return summary


def is_current(summary: dict[str, Any], study: optuna.Study) -> bool:
    """Whether a summary is of all trials that the study has, and not of a call before."""
    return bool(summary["n_runs"] == count(study, *ENDED, TrialState.FAIL))


def _key(
    study: optuna.Study,
    best: FrozenTrial,
    config: StudyConfig,
    test_file: str | list[str] | None,
    replicates: SeedReplicates | None,
) -> dict[str, Any]:
    """What a summary was made of: where it is the same, nothing is refitted or scored once more."""
    return {
        "n_trials": finished(study),
        "n_runs": count(study, *ENDED, TrialState.FAIL),  # a paused trial and the one that resumes it are two
        "best_trial": best.number,
        "requested": {name: getattr(config, name) for name in ("refit", "refit_val_file", "calibration", "ensemble")},
        "test_file": test_file,
        "seed_replicates": None if replicates is None else replicates.as_dict(),
    }


def _known_summary(
    run_dir: Path, files: Location, key: dict[str, Any], nested: dict[str, Any] | None
) -> dict[str, Any] | None:
    """The summary that is there, if it was made of the same; the nested cross-validation is added to it.

    One that another machine has published is fetched with its results.
    """
    known: dict[str, Any] | None = read_json(run_dir / "summary.json")
    if files != run_dir and not _is_of(known, key) and _is_of(read_json(files / "summary.json"), key):
        fetch_results(files, run_dir)
        known = read_json(run_dir / "summary.json")
    if known is None or not _is_of(known, key):
        return None
    if nested is not None and known.get("nested") != nested:
        known["nested"] = nested
        write_json(run_dir / "summary.json", known)
    return known


def _is_of(summary: dict[str, Any] | None, key: dict[str, Any]) -> bool:
    """Whether there is a summary, and it was made of this."""
    return summary is not None and all(summary.get(name) == value for name, value in key.items())


def _estimate(
    study: optuna.Study,
    predictions: Location,
    monitor: MonitorConfig,
    task: Task,
    oof: OutOfFold,
    replicates: SeedReplicates | None,
    baseline: tuple[FrozenTrial, Steps] | None,
    winner: FrozenTrial,
) -> dict[str, Any] | None:
    """What the rows that did not choose the winner say about it (`evaluation.estimate`); None for loss and classes."""
    if monitor.metric == "loss" or isinstance(monitor.metric, dict):
        return None
    steps = Steps(**study.user_attrs["steps"])
    labels, groups = oof.predictions.labels, oof.predictions.groups
    assert labels is not None
    with local_folder(predictions) as folder:
        return estimate_study(
            study,
            Kept(folder, steps),
            Target(task, monitor.name, monitor.tuned, monitor.objective),
            ValidationRows(labels.numpy(), oof.fold.numpy(), None if groups is None else groups.numpy()),
            winner=winner,
            replicates={} if replicates is None or replicates.missing else dict(replicates.complete),
            replicates_kept=Kept(folder / seed_replicates.FOLDER, steps),
            configured=None if baseline is None else (baseline[0], Kept(folder / baselines.FOLDER, baseline[1])),
        )


def _judged(best: FrozenTrial, monitor: MonitorConfig, schema: Schema, oof: OutOfFold) -> dict[str, Any]:
    """What the out-of-fold predictions of the best trial say."""
    value, baseline = score_of(best), majority_baseline(schema, oof.predictions, monitor)
    assert value is not None
    return {
        "task": schema.task,
        "metric_class": monitor.metric if isinstance(monitor.metric, dict) else None,
        "positive_label": schema.positive_label,
        "majority_baseline": baseline if math.isfinite(baseline) else None,
        "warnings": warn_of_constants(schema, oof.predictions, monitor, value, baseline),
        "threshold": oof.threshold if schema.task in HAS_THRESHOLD else None,
        "threshold_note": oof.threshold_note,
        "out_of_fold": oof.metrics,
    }


def describe_study(run_dir: Path, summary: dict[str, Any], files: Location | None = None) -> str:
    """What a user reads at the end of a study: the metrics, the files, and what they are for.

    Args:
        run_dir: the run's folder.
        summary: the content of `summary.json`.
        files: where the study keeps what its processes share; None: in the run folder.
    """
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
        *describe_scores(summary),
        *([] if summary["majority_baseline"] is None else [f"{baseline}: {metric} {summary['majority_baseline']:.4f}"]),
        *(f"WARNING: {warning}" for warning in summary["warnings"]),
        *([f"positive label: {summary['positive_label']}"] if summary["positive_label"] is not None else []),
        "its hyperparameters:",
        *(f"  {name}: {value}" for name, value in summary["best_params"].items()),
    ]
    if summary["seed_replicates"]:
        lines += describe_seed_replicates(summary["seed_replicates"], metric)
    if "front" in summary:
        lines.append(f"Pareto front of {metric} and {summary['cost']}:")
        lines += [f"  trial {one['number']}: {one['score']:.4f}, {one['cost']:.4g} s" for one in summary["front"]]
    if summary["threshold"] is not None:
        lines.append(f"threshold {summary['threshold']:.3f}: {summary['threshold_note']}")
    lines += describe_exported(summary)
    written = {
        "summary.json": "these results",
        "best.yaml": "the best hyperparameters, for lightning-bge fit",
        "trials.csv": "all trials",
        **({"oof.csv": "out-of-fold predictions"} if summary["out_of_fold"] else {}),
        **({"nested.csv": "predictions for the rows of the outer folds"} if summary["nested"] else {}),
        "run.json": "how to repeat the study",
        **({JOURNAL: "the study's storage"} if (run_dir / JOURNAL).is_file() else {}),
    }
    model = run_dir / "model"
    if summary["model_dir"] not in (None, str(model)) and not model.is_dir():  # another machine has exported it
        lines.append(f"exported model: {summary['model_dir']}")
    elif summary["model_dir"]:
        written["model/"] = "the exported model, for transformers and sentence-transformers"
    if "model/" in written and summary.get("ensemble"):
        written["model/"] = "the exported models, for lightning-bge predict and lightning_bge.models.Ensemble"
    lines += ["", f"{run_dir}/", *(f"  {name:<14}{text}" for name, text in written.items())]
    copies = [] if files in (None, run_dir) else [f"{files}/ has copies, which all of its processes see"]
    return "\n".join([*lines, *copies])
