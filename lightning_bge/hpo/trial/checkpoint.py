"""What is kept of a trial's folds, and the files from which it is continued bit for bit after a pause or a stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_bge.hpo.pruning.callback import FoldPruningCallback
from lightning_bge.hpo.steps import Report
from lightning_bge.models.effective_batch import EffectiveBatchModule
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.runtime.locations import Location, file_sizes, local_copy
from lightning_bge.runtime.run_folder import create_folder, write_atomically

STATE = "state.pt"


@dataclass(frozen=True)
class FoldResult:
    """What is kept of a finished fold: no callback, as Lightning ties those to module, trainer and optimizer.

    Attributes:
        score: the fold's part of the trial's value.
        epochs: the epoch it comes from, from 1.
        predictions: of that epoch.
        rows: number of validation rows; None: it is not known.
    """

    score: float
    epochs: int
    predictions: Predictions | None
    rows: int | None


class ScoredEpoch(Callback):
    """Keeps which epoch a fold's score comes from, and of an `EffectiveBatchModule` its predictions and all logits.

    Args:
        monitor: the logged metric.
        objective: whether the `best` or the `last` epoch is scored.
        direction: `maximize` or `minimize`.

    Attributes:
        epochs: the scored epoch so far, from 1.
        predictions: of that epoch.
        logits: of each validation that this callback has seen, within epochs too.
    """

    def __init__(self, monitor: str, objective: str, direction: str) -> None:
        self.monitor, self.objective = monitor, objective
        self.sign = 1.0 if direction == "maximize" else -1.0
        self.epochs = 0
        self.predictions: Predictions | None = None
        self.logits: list[Tensor] = []
        self.best = -float("inf")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the logits, and the predictions where this epoch is the one to be scored so far."""
        if trainer.sanity_checking:
            return
        found = pl_module.predictions if isinstance(pl_module, EffectiveBatchModule) else None
        if found is not None:
            self.logits.append(found.logits)
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # a validation within an epoch
        value = self.sign * float(trainer.callback_metrics.get(self.monitor, float("nan")))
        if self.objective == "last" or value > self.best:
            self.best, self.epochs = value, trainer.current_epoch + 1
            self.predictions = found

    def state(self) -> dict[str, Any]:
        """Plain data and tensors, for `restore`."""
        return {"best": self.best, "epochs": self.epochs, "predictions": _plain(self.predictions)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue with the state of another callback."""
        self.best, self.epochs = state["best"], state["epochs"]
        self.predictions = _predictions(state["predictions"])


@dataclass(frozen=True)
class OpenFold:
    """A fold in the middle of which a trial was saved.

    Attributes:
        reports: what it had reported (`FoldPruningCallback.state`).
        curve: its validations so far.
        scored: its scored epoch so far (`ScoredEpoch.state`).
        checkpoint: its trainer's checkpoint; None: the fold had made its last report.
    """

    reports: dict[str, Any]
    curve: list[Report]
    scored: dict[str, Any]
    checkpoint: Location | None


@dataclass(frozen=True)
class SavedTrial:
    """What is needed to continue a trial that was paused or stopped.

    Attributes:
        step: the last one that it had reported.
        folds: those that are finished.
        curve: all validations of each of them.
        fold: the one in the middle of which it was saved; None: it was saved between two folds.
    """

    step: int
    folds: list[FoldResult]
    curve: list[list[Report]]
    fold: OpenFold | None

    @classmethod
    def load(cls, folder: Location) -> SavedTrial | None:
        """Read what `save_trial` wrote; None: there is nothing, or a part of it was deleted."""
        path = folder / STATE
        if not path.is_file():
            return None
        with local_copy(path) as copy:
            state = torch.load(copy, weights_only=True)
        *curve, current = [[Report(*report) for report in fold] for fold in state["curve"]]
        folds = [FoldResult(**{**fold, "predictions": _predictions(fold["predictions"])}) for fold in state["folds"]]
        if state["fold"] is None:
            return cls(state["step"], folds, [*curve, current], None)
        name = state["fold"].pop("checkpoint")
        checkpoint = None if name is None else folder / name
        if checkpoint is not None and not checkpoint.is_file():
            return None
        fold = OpenFold(**state["fold"], curve=current, checkpoint=checkpoint)
        return cls(state["step"], folds, curve, fold)


def save_trial(
    folder: Location,
    *,
    step: int,
    folds: Sequence[FoldResult],
    curve: Sequence[Sequence[Report]],
    fold: tuple[FoldPruningCallback, ScoredEpoch, Trainer | None] | None = None,
) -> None:
    """Write what is needed to continue a trial, whole or not at all.

    Args:
        folder: of the trial's parameter set.
        step: the last one that it has reported.
        folds: those that are finished.
        curve: all validations so far, of each fold.
        fold: the callbacks of the current fold, and its trainer; without a trainer where it has made its last report,
            as no weights are needed. None: the trial is between two folds.
    """
    for place in (folder.parent, folder):  # one by one: the mode is that of the last folder alone
        create_folder(place)
    state: dict[str, Any] = {
        "step": step,
        "folds": [{**vars(one), "predictions": _plain(one.predictions)} for one in folds],
        "curve": [[list(report) for report in one] for one in curve],
        "fold": None,
    }
    name = None
    if fold is not None:
        reports, scored, trainer = fold
        # a name of its own: the old state refers to the old weights until it is replaced
        name = None if trainer is None else f"fold-{len(folds)}-step-{trainer.global_step}.ckpt"
        state["fold"] = {"reports": reports.state(), "scored": scored.state(), "checkpoint": name}
        if trainer is not None:
            write_atomically(folder / str(name), trainer.save_checkpoint)
    write_atomically(folder / STATE, lambda draft: torch.save(state, draft))
    for other in file_sizes(folder).keys() - {STATE, name}:
        (folder / other).unlink(missing_ok=True)


def _plain(predictions: Predictions | None) -> dict[str, Any] | None:
    return None if predictions is None else dict(vars(predictions))


def _predictions(plain: dict[str, Any] | None) -> Predictions | None:
    return None if plain is None else Predictions(**plain)
