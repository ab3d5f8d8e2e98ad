"""The out-of-fold predictions of the best trials: kept on the disk, and what they say of threshold and metrics."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import optuna
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_bge.hpo.config import BEST
from lightning_bge.hpo.ranking import best_parameter_sets
from lightning_bge.hpo.trial.kept_predictions import kept_file, numbered_files
from lightning_bge.models.metrics.compute import compute_metrics
from lightning_bge.models.metrics.config import MonitorConfig
from lightning_bge.models.metrics.names import DECISION_METRICS, HAS_THRESHOLD
from lightning_bge.models.metrics.predictions import Predictions, scores
from lightning_bge.models.metrics.threshold import best_threshold, cross_fitted_decisions
from lightning_bge.runtime.locations import Location, local_copy
from lightning_bge.runtime.run_folder import create_folder, write_atomically
from lightning_bge.types import Schema


def predictions_file(folder: Location, number: int) -> Location:
    """The file of a trial's out-of-fold predictions."""
    return kept_file(folder, number)


def drop_predictions(study: optuna.Study, folder: Location) -> None:
    """Delete the predictions of trials that have ended and whose parameter sets are not among the best."""
    # in this order: other processes end trials meanwhile, and what has ended and is not among the best never will be
    ended = {trial.number for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()}
    kept = {trial.number for trial in best_parameter_sets(study, BEST)}
    for number in numbered_files(folder).keys() & (ended - kept):
        predictions_file(folder, number).unlink(missing_ok=True)


def save_predictions(folds: Sequence[Predictions], folder: Location, number: int) -> None:
    """Write the folds' predictions of a trial as one safetensors file, whole or not at all."""
    create_folder(folder)
    tensors: dict[str, Tensor] = {"fold": torch.cat([torch.full((len(p.rows),), k) for k, p in enumerate(folds)])}
    for name in ("rows", "logits", "labels", "groups"):
        if parts := [part for one in folds if (part := getattr(one, name)) is not None]:
            tensors[name] = torch.cat(parts)
    write_atomically(predictions_file(folder, number), lambda draft: save_file(tensors, draft))


def load_predictions(path: Location) -> tuple[Predictions, Tensor]:
    """Read what `save_predictions` wrote: the predictions, sorted by row, and each row's fold, int64 [N]."""
    with local_copy(path) as copy:
        tensors = load_file(copy)
    order = tensors["rows"].argsort()
    fold = tensors.pop("fold")[order]
    return Predictions(**{name: tensor[order] for name, tensor in tensors.items()}), fold


@dataclass(frozen=True)
class OutOfFold:
    """The best trial's out-of-fold predictions, and the threshold that they suggest.

    Attributes:
        predictions: one for each row that was in a fold, sorted by row.
        fold: int64 [N], each row's fold.
        threshold: best over all of them (binary, multi-label), else 0.5, which nothing uses.
        metrics: of these predictions; decisions are made at thresholds that were chosen on the *other* folds.
        threshold_note: on which rows the threshold was chosen and evaluated.
    """

    predictions: Predictions
    fold: torch.Tensor
    threshold: float
    metrics: dict[str, float]
    threshold_note: str


def judge_out_of_fold(path: Location, schema: Schema, monitor: MonitorConfig, temperature: float = 1.0) -> OutOfFold:
    """Choose the threshold on the out-of-fold predictions, and judge it on rows that were not used to choose it.

    Args:
        path: of the predictions, as `save_predictions` wrote them.
        schema: of the model.
        monitor: the metric of the study, for which the threshold is best.
        temperature: by which the exported model's logits are divided, and these as well.
    """
    predictions, fold = load_predictions(path)
    predictions = replace(predictions, logits=predictions.logits / temperature)
    assert predictions.labels is not None
    metrics = compute_metrics(schema, predictions, per_class=True, monitored=monitor.metric)
    if schema.task not in HAS_THRESHOLD:
        return OutOfFold(predictions, fold, 0.5, metrics, "the task has no threshold")
    score, labels = scores(schema.task, predictions.logits).numpy(), predictions.labels.numpy()
    threshold = best_threshold(score, labels, monitor.name)
    decided = cross_fitted_decisions(score, labels, fold.numpy(), monitor.name)
    if len(fold.unique()) == 1:
        note = "chosen and evaluated on the same validation rows: optimistic"
    else:
        note = "chosen on all folds; out_of_fold in summary.json has each fold at the threshold of the other folds"
    # decisions as extreme logits: the same function judges them, at any threshold
    logits = torch.from_numpy(decided * 40.0 - 20.0).float().reshape(predictions.logits.shape)
    extreme, monitored = replace(predictions, logits=logits), monitor.metric if monitor.of_decisions else None
    at_threshold = compute_metrics(schema, extreme, per_class=True, monitored=monitored)
    of_scores = {name: value for name, value in metrics.items() if name.split("/")[0] not in DECISION_METRICS}
    return OutOfFold(predictions, fold, threshold, at_threshold | of_scores, note)
