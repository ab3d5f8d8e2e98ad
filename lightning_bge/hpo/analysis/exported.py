"""What `summary.json` says of the exported model, in sentences."""

from collections.abc import Mapping
from typing import Any

NAMES = {
    "negative_log_likelihood": "negative log-likelihood",
    "expected_calibration_error": "expected calibration error",
}


def describe_exported(summary: Mapping[str, Any]) -> list[str]:
    """How the exported model was calibrated and trained, one sentence a line, without a full stop."""
    parts = {"calibration": _calibration, "refit": _refit, "ensemble": _ensemble}
    return [line for name, describe in parts.items() if summary.get(name) for line in describe(summary[name])]


def _calibration(found: Mapping[str, Any]) -> list[str]:
    changes = [
        f"{text} {found['before'][name]:.4f} before, {found['after'][name]:.4f} after" for name, text in NAMES.items()
    ]
    return [f"calibrated by the temperature {found['temperature']:.3f}: {'; '.join(changes)} ({found['note']})"]


def _refit(refit: Mapping[str, Any]) -> list[str]:
    folds, epochs = refit["fold_epochs"], refit["epochs"]
    source = "the mean of the folds' scored epochs" if len(folds) > 1 else "as in the scored epoch of the trial"
    rows = f"all {refit['train_file_rows']:,} rows of the training file"
    if refit["outer_fold_rows_left_out"]:
        rows += f" outside of the outer fold's {refit['outer_fold_rows_left_out']:,}"
    if refit["val_file_rows"]:
        rows += f" and all {refit['val_file_rows']:,} rows of the validation file"
    lines = [f"refitted on {rows} for {epochs} epoch{'s'[: epochs > 1]}, {source}"]
    if refit["val_file_rows_left_out"]:
        lines.append(
            f"not trained on: the {refit['val_file_rows_left_out']:,} rows of the validation file "
            "(hpo.refit_val_file includes them)"
        )
    return lines + _schedule(refit) + _threshold(refit)


def _ensemble(found: Mapping[str, Any]) -> list[str]:
    members, threshold = found["members"], _threshold(found)
    rows, epochs = (", ".join(f"{one[name]:,}" for one in members) for name in ("rows", "epochs"))
    if threshold:
        threshold[0] += ", each of which one model has made, and not their mean"
    lines = [
        f"exported: the models of the {len(members)} folds, whose scores are averaged",
        f"each is trained on the rows of the other folds ({rows}) to the epoch that was scored in its fold ({epochs})",
    ]
    return lines + _schedule(found) + threshold


def _schedule(found: Mapping[str, Any]) -> list[str]:
    schedule = found["schedule"]
    epochs = f"{schedule['epochs']} epoch{'s'[: schedule['epochs'] > 1]}"
    warmup = _warmup(schedule["warmup"])
    return [f"learning-rate schedule, as in the trial: {schedule['name']} over {epochs}, {warmup}"]


def _threshold(found: Mapping[str, Any]) -> list[str]:
    if found["threshold"] is None:
        return []
    return [f"threshold {found['threshold']:.3f} comes from the {found['threshold_source']}"]


def _warmup(warmup: float) -> str:
    if not warmup:
        return "without warm-up"
    return f"warm-up {warmup:.0%} of its steps" if warmup < 1 else f"warm-up {warmup:g} steps"
