"""What is kept of a trial's folds, and the checkpoint from which a paused trial is resumed bit for bit."""

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
class FoldResult:
    """What is kept of a finished fold: no callback, as Lightning ties those to module, trainer and optimizer.

    Attributes:
        score: the fold's part of the trial's value.
        epochs: the epoch it comes from, from 1.
        predictions: of that epoch.
        rows: number of validation rows.
    """

    score: float
    epochs: int
    predictions: Predictions | None
    rows: int


class ScoredEpoch(Callback):
    """Keeps which epoch a fold's score comes from, and its predictions.

    Args:
        monitor: the logged metric.
        objective: whether the `best` or the `last` epoch is scored.
        direction: `maximize` or `minimize`.
    """

    def __init__(self, monitor: str, objective: str, direction: str) -> None:
        self.monitor, self.objective = monitor, objective
        self.sign = 1.0 if direction == "maximize" else -1.0
        self.epochs = 0
        self.predictions: Predictions | None = None
        self.best = -float("inf")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep this epoch's predictions where it is the one to be scored so far."""
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # a validation within an epoch
        value = self.sign * float(trainer.callback_metrics.get(self.monitor, float("nan")))
        if self.objective == "last" or value > self.best:
            self.best, self.epochs = value, trainer.current_epoch + 1
            self.predictions = pl_module.predictions  # type: ignore[assignment]

    def state(self) -> dict[str, Any]:
        """Plain data and tensors, for `restore`."""
        return {"best": self.best, "epochs": self.epochs, "predictions": _plain(self.predictions)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue with the state of another callback."""
        self.best, self.epochs = state["best"], state["epochs"]
        self.predictions = _predictions(state["predictions"])


@dataclass(frozen=True)
class PausedTrial:
    """A trial that was paused after a report, to be resumed.

    Attributes:
        folds: those that were finished.
        curve: all validations so far, of each fold.
        reports: what the current fold had reported (`FoldPruningCallback.state`).
        scored: its scored epoch so far (`ScoredEpoch.state`).
        checkpoint: its trainer's checkpoint; None: the fold had made its last report.
    """

    folds: list[FoldResult]
    curve: list[list[Report]]
    reports: dict[str, Any]
    scored: dict[str, Any]
    checkpoint: Path | None

    @classmethod
    def load(cls, folder: Path) -> PausedTrial | None:
        """Read what `pause` wrote; None: a part or all of it was deleted."""
        path, checkpoint = folder / "state.pt", folder / "fold.ckpt"
        state = torch.load(path, weights_only=True) if path.is_file() else None
        if state is None or (state["checkpoint"] and not checkpoint.is_file()):
            return None
        folds = [FoldResult(**{**fold, "predictions": _predictions(fold["predictions"])}) for fold in state["folds"]]
        curve = [[Report(*report) for report in fold] for fold in state["curve"]]
        return cls(folds, curve, state["reports"], state["scored"], checkpoint if state["checkpoint"] else None)


def pause(
    folder: Path,
    trainer: Trainer | None,
    *,
    folds: Sequence[FoldResult],
    curve: Sequence[Sequence[Report]],
    reports: FoldPruningCallback,
    scored: ScoredEpoch,
) -> None:
    """Write what is needed to resume a trial.

    Args:
        folder: the trial's own.
        trainer: of the current fold; None: it has made its last report, and no weights are needed.
        folds: those that are finished.
        curve: all validations so far, of each fold.
        reports: the fold's callback that reports.
        scored: the fold's callback that keeps the scored epoch.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if trainer is not None:
        trainer.save_checkpoint(folder / "fold.ckpt")
    state = {
        "folds": [{**vars(fold), "predictions": _plain(fold.predictions)} for fold in folds],
        "curve": [[list(report) for report in fold] for fold in curve],
        "reports": reports.state(),
        "scored": scored.state(),
        "checkpoint": trainer is not None,
    }
    draft = folder / "state.draft"
    torch.save(state, draft)
    draft.replace(folder / "state.pt")


def _plain(predictions: Predictions | None) -> dict[str, Any] | None:
    return None if predictions is None else dict(vars(predictions))


def _predictions(plain: dict[str, Any] | None) -> Predictions | None:
    return None if plain is None else Predictions(**plain)
