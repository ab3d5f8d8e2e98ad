"""What `summary.json` says of the exported model, in sentences."""

from collections.abc import Mapping
from typing import Any

NAMES = {
    "negative_log_likelihood": "negative log-likelihood",
    "expected_calibration_error": "expected calibration error",
}


def describe_exported(summary: Mapping[str, Any]) -> list[str]:
    """How the exported model was calibrated and trained, one sentence a line, without a full stop."""
    calibration, refit = summary.get("calibration"), summary.get("refit")
    return ([] if calibration is None else [_calibration(calibration)]) + ([] if refit is None else _refit(refit))


def _calibration(found: Mapping[str, Any]) -> str:
    changes = [
        f"{text} {found['before'][name]:.4f} before, {found['after'][name]:.4f} after" for name, text in NAMES.items()
    ]
    return f"calibrated by the temperature {found['temperature']:.3f}: {'; '.join(changes)} ({found['note']})"


def _refit(refit: Mapping[str, Any]) -> list[str]:
    folds, epochs, schedule = refit["fold_epochs"], refit["epochs"], refit["schedule"]
    source = "the mean of the folds' scored epochs" if len(folds) > 1 else "as in the scored epoch of the trial"
    rows = f"all {refit['train_file_rows']:,} rows of the training file"
    if refit["val_file_rows"]:
        rows += f" and all {refit['val_file_rows']:,} rows of the validation file"
    lines = [f"refitted on {rows} for {epochs} epoch{'s'[: epochs > 1]}, {source}"]
    if refit["val_file_rows_left_out"]:
        lines.append(
            f"not trained on: the {refit['val_file_rows_left_out']:,} rows of the validation file "
            "(hpo.refit_val_file includes them)"
        )
    lines.append(
        f"learning-rate schedule of the refit, as in the trial: {schedule['name']} over {schedule['epochs']} "
        f"epoch{'s'[: schedule['epochs'] > 1]}, {_warmup(schedule['warmup'])}"
    )
    if refit["threshold"] is not None:
        lines.append(f"its threshold {refit['threshold']:.3f} comes from the {refit['threshold_source']}")
    return lines


def _warmup(warmup: float) -> str:
    if not warmup:
        return "without warm-up"
    return f"warm-up {warmup:.0%} of its steps" if warmup < 1 else f"warm-up {warmup:g} steps"
