"""What a study ends with: the best settings, the model refitted with them, and the figures they are judged by."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
import yaml
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.errors import StudyError
from lightning_bge.hpo.config import FINISHED
from lightning_bge.hpo.objective import Build, TrialSetup, drop_predictions, load_predictions, predictions_file
from lightning_bge.hpo.progress import count, ended_early, finished
from lightning_bge.hpo.ranking import cost_of, front, ranked, score_of
from lightning_bge.hpo.seed_replicates import SeedReplicates, describe_seed_replicates
from lightning_bge.models.metrics import (
    LOWER_IS_BETTER,
    MonitorConfig,
    Predictions,
    best_threshold,
    compute_metrics,
    cross_fitted_decisions,
    scores,
)
from lightning_bge.models.prediction_file import write_predictions
from lightning_bge.runtime.memory import release
from lightning_bge.runtime.run_folder import read_json, write_json, write_text
from lightning_bge.types import Schema

HAS_THRESHOLD = ("binary", "multilabel")


@dataclass(frozen=True)
class OutOfFold:
    """The best trial's out-of-fold predictions, and the threshold that they suggest.

    Attributes:
        predictions: one for each row that was in a fold, sorted by row.
        fold: int64 [N], each row's fold.
        threshold: best over all of them (binary, multi-label), else 0.5 and of no meaning.
        metrics: of these predictions; decisions at thresholds that were chosen on the *other* folds.
        threshold_note: on which rows the threshold was chosen and judged.
    """

    predictions: Predictions
    fold: torch.Tensor
    threshold: float
    metrics: dict[str, float]
    threshold_note: str


def finish_study(
    study: optuna.Study,
    build: Build,
    monitor: MonitorConfig,
    run_dir: Path,
    epochs: int,
    refit: bool,
    replicates: SeedReplicates | None = None,
) -> dict[str, Any]:
    """Write `best.yaml`, `trials.csv`, `oof.csv`, the exported model and `summary.json`; return the summary.

    The best trial is the winner of the seed replicates, where there are any, else the one with the best score. A
    study that was finished before with the same trials is not refitted, and its test file is not scored again.

    Raises:
        StudyError: no trial ran to its end.
    """
    if count(study, TrialState.COMPLETE) == 0:
        raise StudyError(
            f"{run_dir}: none of {len(study.trials)} trials ran to its end, so there is no best one. "
            "Run the command again, with a longer hpo.timeout or more hpo.n_trials, or prune less (hpo.pruner)"
        )
    best = ranked(study)[0]
    if replicates is not None:
        best = study.get_trials(deepcopy=False)[replicates.winner]
    write_text(run_dir / "trials.csv", trials_table(study))
    setup = build(best.params)
    test_file = setup.datamodule.test_file
    known = read_json(run_dir / "summary.json")
    ended = finished(study) + count(study, TrialState.FAIL)
    runs = count(study, *FINISHED, TrialState.FAIL)  # those that go on with a paused one are counted too
    key: dict[str, Any] = {
        "n_trials": ended,
        "n_runs": runs,
        "best_trial": best.number,
        "refit": refit,
        "test_file": test_file,
    }
    key["seed_replicates"] = None if replicates is None else replicates.as_dict()
    if known is not None:
        known = {"n_runs": known.get("n_trials"), **known}  # older versions count runs as trials
        if all(known.get(name) == value for name, value in key.items()):
            return known
    schema = setup.datamodule.schema
    assert schema is not None
    drop_predictions(study, run_dir / "oof")
    oof = judge_out_of_fold(predictions_file(run_dir / "oof", best.number), schema, str(monitor.metric))
    schema = replace(schema, threshold=oof.threshold)
    write_predictions(run_dir / "oof.csv", schema, oof.predictions, {"fold": oof.fold.tolist()})
    write_text(run_dir / "best.yaml", _best_yaml(setup, best, run_dir))
    refit_epochs = max(1, round(float(np.mean(best.user_attrs["fold_epochs"]))))
    summary = _summary(study, best, monitor, schema, oof, refit_epochs) | key
    if refit:
        summary |= _refit(build, best, schema, refit_epochs, epochs, run_dir)
    write_json(run_dir / "summary.json", summary)
    return summary


def judge_out_of_fold(path: Path, schema: Schema, metric: str) -> OutOfFold:
    """Choose the threshold on the out-of-fold predictions, and judge it on rows that it has not seen."""
    predictions, fold = load_predictions(path)
    assert predictions.labels is not None
    metrics = compute_metrics(schema, predictions, per_class=True)
    if schema.task not in HAS_THRESHOLD:
        return OutOfFold(predictions, fold, 0.5, metrics, "the task has no threshold")
    score, labels = scores(schema.task, predictions.logits).numpy(), predictions.labels.numpy()
    threshold = best_threshold(score, labels, metric)
    folds = [np.flatnonzero(fold.numpy() == k) for k in fold.unique().tolist()]
    if len(folds) == 1:
        note = "chosen and judged on the same validation rows: optimistic"
        decided = (score >= threshold).astype(np.int64)
    else:
        note = "chosen on all folds; the figures here are each fold's at the threshold of the other folds"
        decided = cross_fitted_decisions(score, labels, folds, metric)
    # decisions as extreme logits: the same function judges them, at any threshold
    at_threshold = compute_metrics(schema, _as_logits(predictions, decided), per_class=True)
    ranking = {name: value for name, value in metrics.items() if name in ("auroc", "average_precision", "map", "mrr")}
    return OutOfFold(predictions, fold, threshold, at_threshold | ranking, note)


def _as_logits(predictions: Predictions, decided: np.ndarray) -> Predictions:
    logits = torch.from_numpy(decided * 40.0 - 20.0).float().reshape(predictions.logits.shape)
    return replace(predictions, logits=logits)


def majority_baseline(schema: Schema, predictions: Predictions, metric: str) -> float:
    """The metric's best value among constant answers: each class (or yes, or no) for every row, or the mean."""
    labels = predictions.labels
    assert labels is not None
    shape = predictions.logits.shape
    if schema.task == "regression":
        answers = [labels.mean().expand(shape)]
    elif schema.task == "multiclass":
        eye = torch.eye(shape[1]) * 20
        answers = [eye[number].expand(shape) for number in range(shape[1])]
    else:
        answers = [torch.full(shape, value) for value in (-20.0, 20.0)]
    found = [
        value
        for logits in answers
        if (value := compute_metrics(schema, replace(predictions, logits=logits)).get(metric)) is not None
    ]
    if not found:
        return float("nan")
    return min(found) if metric in LOWER_IS_BETTER else max(found)


def trials_table(study: optuna.Study) -> str:
    """All trials as CSV: number, state, value, cost, seconds, reports, where pruned, folds' scores, parameters."""
    names = sorted({name for trial in study.trials for name in trial.params})
    attributes = [
        *("pruned_at", "paused_at", "resumes", "oom_where", "oom_requested", "oom_free"),
        *("fold_scores", "fold_epochs", "retry_of", "swept"),
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["number", "state", "value", "cost", "seconds", "reports", *attributes, *names])
    for trial in study.get_trials(deepcopy=False):
        seconds = round(trial.duration.total_seconds(), 3) if trial.duration else ""
        writer.writerow(
            [trial.number, trial.state.name, _blank(score_of(trial)), _blank(cost_of(trial)), seconds]
            + [len(trial.intermediate_values)]
            + [_blank(trial.user_attrs.get(name)) for name in attributes]
            + [_blank(trial.params.get(name)) for name in names]
        )
    return text.getvalue()


def _blank(value: Any) -> Any:
    return "" if value is None else value


def _best_yaml(setup: TrialSetup, best: FrozenTrial, run_dir: Path) -> str:
    config = {**setup.config(), "run_dir": str(run_dir / "fit")}
    head = (
        f"# The best settings of the study {run_dir.name}: trial {best.number}. Use: lightning-bge fit -c THIS_FILE\n"
    )
    return head + yaml.safe_dump(config, sort_keys=False)


def _summary(
    study: optuna.Study,
    best: FrozenTrial,
    monitor: MonitorConfig,
    schema: Schema,
    oof: OutOfFold,
    refit_epochs: int,
) -> dict[str, Any]:
    failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    interrupted = [trial for trial in failed if "swept" in trial.user_attrs]
    return {
        "study": study.study_name,
        "n_complete": count(study, TrialState.COMPLETE),
        "n_pruned": len(ended_early(study)),
        "n_out_of_memory": sum("oom_where" in trial.user_attrs for trial in study.get_trials(deepcopy=False)),
        "n_failed": len(failed) - len(interrupted),
        "n_interrupted": len(interrupted),
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
        "refit_epochs": refit_epochs,
        "wall_seconds": round(wall_seconds(study), 1),
        "model_dir": None,
        **_front(study),
    }


def _front(study: optuna.Study) -> dict[str, Any]:
    """The Pareto-optimal trials, the best score first; nothing where the study has no cost."""
    if len(study.directions) == 1:
        return {}
    found = [
        {"number": trial.number, "score": score_of(trial), "cost": cost_of(trial), "params": trial.params}
        for trial in front(study)
    ]
    return {"cost": study.user_attrs["settings"]["hpo.cost"], "front": found}


def wall_seconds(study: optuna.Study) -> float:
    """Seconds in which at least one trial was running: right over several workers, and over pauses between calls."""
    spans = sorted(
        (trial.datetime_start, trial.datetime_complete)
        for trial in study.get_trials(deepcopy=False)
        if trial.datetime_start and trial.datetime_complete
    )
    total, end = 0.0, None
    for start, stop in spans:
        begin = start if end is None else max(start, end)
        total += max(0.0, (stop - begin).total_seconds())
        end = stop if end is None else max(end, stop)
    return total


def _refit(
    build: Build, best: FrozenTrial, schema: Schema, refit_epochs: int, epochs: int, run_dir: Path
) -> dict[str, Any]:
    """Train the best settings on all rows, on the folds' schedule but stopped where they were best; export; test."""
    horizon = best.params.get("trainer.max_epochs", epochs)
    setup = build({**best.params, "model.schedule.epochs": horizon})
    model, datamodule = setup.model, setup.datamodule
    try:
        datamodule.select_fold(None)
        trainer = setup.make_trainer(max_epochs=refit_epochs, limit_val_batches=0)
        trainer.fit(model, datamodule=datamodule)
        assert model.schema is not None
        model.schema = replace(model.schema, threshold=schema.threshold)
        folder = model.export(run_dir / "model", datamodule.new_tokenizer())
        found: dict[str, Any] = {"model_dir": str(folder)}
        if datamodule.test_file is not None:
            trainer.test(model, datamodule=datamodule, verbose=False)
            assert model.predictions is not None
            write_predictions(run_dir / "test.csv", model.schema, model.predictions)
            found["test"] = {
                name.removeprefix("test_"): float(value) for name, value in trainer.callback_metrics.items()
            }
    finally:
        release(host=False)
    return found


def describe_study(run_dir: Path, summary: dict[str, Any]) -> str:
    """What a user wants to read at the end of a study: the figures, where everything is, what to do next."""
    lines = [
        "",
        f"study {summary['study']}: {summary['n_complete']} trials complete, {summary['n_pruned']} pruned, "
        f"{summary['n_failed']} failed, {summary['wall_seconds']:.0f} s",
        f"best {summary['metric']} {summary['best_value']:.4f} (trial {summary['best_trial']}, mean over folds; "
        f"always the same answer: {summary['majority_baseline']:.4f})",
        *(f"  {name}: {value}" for name, value in summary["best_params"].items()),
    ]
    if summary.get("n_out_of_memory"):  # a summary of an older version does not have it
        lines.insert(2, f"{summary['n_out_of_memory']} of the pruned trials did not fit into memory (trials.csv: oom_)")
    if summary.get("seed_replicates"):
        lines += describe_seed_replicates(summary["seed_replicates"], summary["metric"])
    if "front" in summary:
        lines.append(f"best {summary['metric']} for its {summary['cost']}:")
        lines += [f"  trial {one['number']}: {one['score']:.4f}, {one['cost']:.4g} s" for one in summary["front"]]
    if summary["metric"] in summary["out_of_fold"]:
        lines.append(f"out of fold {summary['metric']} {summary['out_of_fold'][summary['metric']]:.4f}")
    if summary["threshold"] is not None:
        lines.append(f"threshold {summary['threshold']:.3f}: {summary['threshold_note']}")
    if summary.get("model_dir"):
        lines.append(f"refitted on all rows for {summary['refit_epochs']} epochs, the mean of the folds' best ones")
    if "test" in summary and summary["metric"] in summary["test"]:
        lines.append(f"test file, scored once: {summary['metric']} {summary['test'][summary['metric']]:.4f}")
    lines += [
        "",
        f"{run_dir}/",
        "  summary.json  these figures      trials.csv  all trials        oof.csv  out-of-fold predictions",
        "  best.yaml     the best settings  run.json    how to repeat it  journal.log  the study",
    ]
    if summary.get("model_dir"):
        lines.append("  model/        loads in transformers and sentence-transformers as it is")
    return "\n".join(lines)
