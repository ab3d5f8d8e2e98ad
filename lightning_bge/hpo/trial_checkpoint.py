"""A fold of a trial: what is kept of it, and what a paused trial leaves on disk so that it goes on bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bge.hpo.pruning.callback import FoldPruningCallback
from lightning_bge.hpo.steps import Report
from lightning_bge.models.metrics import Predictions


@dataclass(frozen=True)
class Fold:
    """What is kept of a fold: no callback, as Lightning ties those to module, trainer and optimizer.

    Attributes:
        score: what counts for the trial.
        epochs: the epoch it comes from, from 1.
        predictions: of that epoch.
        rows: number of validation rows.
    """

    score: float
    epochs: int
    predictions: Predictions | None
    rows: int


class EpochThatCounts(Callback):
    """Remembers which epoch a fold's score comes from, and its predictions.

    Args:
        monitor: the logged metric.
        objective: `best` or `last`.
        direction: `maximize` or `minimize`.
    """

    def __init__(self, monitor: str, objective: str, direction: str) -> None:
        self.monitor, self.objective = monitor, objective
        self.sign = 1.0 if direction == "maximize" else -1.0
        self.epochs = 0
        self.predictions: Predictions | None = None
        self.best = -float("inf")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep this epoch's predictions where they are the ones that count so far."""
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # a report within an epoch
        value = self.sign * float(trainer.callback_metrics.get(self.monitor, float("nan")))
        if self.objective == "last" or value > self.best:
            self.best, self.epochs = value, trainer.current_epoch + 1
            self.predictions = pl_module.predictions  # type: ignore[assignment]


@dataclass(frozen=True)
class Paused:
    """A trial that stopped at a report, to be resumed.

    Attributes:
        folds: those that were finished.
        curve: all validations so far, of each fold.
        reports: what the fold at hand had reported (`FoldPruningCallback.state`).
        counts: its best epoch so far: value, epoch, predictions.
        checkpoint: its trainer's checkpoint; None: the fold had made its last report.
    """

    folds: list[Fold]
    curve: list[list[Report]]
    reports: dict[str, Any]
    counts: dict[str, Any]
    checkpoint: Path | None

    @classmethod
    def load(cls, folder: Path) -> Paused | None:
        """Read what `pause` wrote; None: it is gone, or a part of it."""
        path, checkpoint = folder / "state.pt", folder / "fold.ckpt"
        state = torch.load(path, weights_only=True) if path.is_file() else None
        if state is None or (state["checkpoint"] and not checkpoint.is_file()):
            return None
        folds = [Fold(**{**fold, "predictions": _predictions(fold["predictions"])}) for fold in state["folds"]]
        curve = [[Report(*report) for report in fold] for fold in state["curve"]]
        counts = {**state["counts"], "predictions": _predictions(state["counts"]["predictions"])}
        return cls(folds, curve, state["reports"], counts, checkpoint if state["checkpoint"] else None)

    def restore(self, reports: FoldPruningCallback, counts: EpochThatCounts) -> None:
        """Let a fold's new callbacks go on where the paused ones stopped."""
        reports.restore(self.reports, self.curve[-1])
        counts.best, counts.epochs, counts.predictions = (self.counts[key] for key in ("best", "epochs", "predictions"))


def pause(
    folder: Path,
    trainer: Trainer | None,
    folds: Sequence[Fold],
    curve: Sequence[Sequence[Report]],
    reports: FoldPruningCallback,
    counts: EpochThatCounts,
) -> None:
    """Write what is needed to go on with a trial.

    Args:
        folder: the trial's own.
        trainer: of the fold at hand; None: it has made its last report, and no weights are needed.
        folds: those that are finished.
        curve: all validations so far.
        reports: the fold's callback.
        counts: likewise.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if trainer is not None:
        trainer.save_checkpoint(folder / "fold.ckpt")
    kept = {"best": counts.best, "epochs": counts.epochs, "predictions": _plain(counts.predictions)}
    state = {
        "folds": [{**vars(fold), "predictions": _plain(fold.predictions)} for fold in folds],
        "curve": [[list(report) for report in fold] for fold in curve],
        "reports": reports.state(),
        "counts": kept,
        "checkpoint": trainer is not None,
    }
    draft = folder / "state.draft"
    torch.save(state, draft)
    draft.replace(folder / "state.pt")


def _plain(predictions: Predictions | None) -> dict[str, Any] | None:
    return None if predictions is None else dict(vars(predictions))


def _predictions(plain: dict[str, Any] | None) -> Predictions | None:
    return None if plain is None else Predictions(**plain)
