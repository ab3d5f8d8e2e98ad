"""What a trial reports to its study while its folds train: one consecutive curve over folds and epochs."""

import math
import time
from collections.abc import Sequence
from typing import Literal

import lightning.pytorch as pl
import optuna
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from optuna_integration import PyTorchLightningPruningCallback

from lightning_bge.errors import ConfigError


class FoldPruningCallback(PyTorchLightningPruningCallback):
    """Report after each epoch of one fold, and stop the fit when the study's pruner says so.

    The report of epoch e (from 0) of fold k has step `k * epochs + e + 1`, so that the steps of a trial run through
    1..folds*epochs. Its value is the mean over the earlier folds' final scores and this fold's score so far. The pruner
    is not asked at the last step of all, where nothing is left to save.

    A value that is NaN or infinite is not reported: the trial is pruned at once, with the user attribute `nan` holding
    the value as text. Optuna's TPE then ranks it by its last finite report, or last of all if it has none. A pruned
    trial carries the user attributes `pruned_at` (the step), `fold` and `epoch` (the last one trained; both from 0).

    Works with any LightningModule that logs `monitor` once an epoch in validation, in one process.

    Args:
        trial: The running trial.
        monitor: Name of the validation metric.
        fold: This fold, from 0.
        folds: Number of folds of the trial.
        epochs: Epochs of a fold at most, the same for all trials of a study.
        earlier: Final scores of the folds before this one: `fold` numbers.
        objective: A fold's score: its `best` epoch so far, or its `last`.
        direction: `maximize` or `minimize`.

    Attributes:
        history: The metric's value for each epoch so far.
        seconds: Wall-clock seconds of each epoch, training and validation together.

    Raises:
        ConfigError: In the constructor for values that contradict each other; in `fit` when the strategy runs several
            processes, the metric is missing, or validation does not run exactly once an epoch.
    """

    def __init__(
        self,
        trial: optuna.Trial,
        monitor: str,
        fold: int,
        folds: int,
        epochs: int,
        earlier: Sequence[float],
        objective: Literal["best", "last"] = "best",
        direction: Literal["maximize", "minimize"] = "maximize",
    ) -> None:
        super().__init__(trial, monitor)
        if epochs < 1 or not 0 <= fold < folds:
            raise ConfigError(f"expected epochs >= 1 and 0 <= fold < folds, got {epochs=}, {fold=}, {folds=}.")
        if len(earlier) != fold:
            raise ConfigError(f"fold {fold} needs the scores of the {fold} folds before it, got {len(earlier)}.")
        if objective not in ("best", "last") or direction not in ("maximize", "minimize"):
            raise ConfigError(f"expected best/last and maximize/minimize, got {objective!r} and {direction!r}.")
        self.fold, self.folds, self.epochs = fold, folds, epochs
        self.earlier = tuple(earlier)
        self.objective, self.direction = objective, direction
        self.history: list[float] = []
        self.seconds: list[float] = []
        self._epoch_start = time.perf_counter()

    @property
    def score(self) -> float:
        """This fold's score so far.

        Raises:
            ConfigError: No epoch was validated yet.
        """
        if not self.history:
            raise ConfigError(f"fold {self.fold} ended before a validation; train for at least one epoch.")
        if self.objective == "last":
            return self.history[-1]
        return max(self.history) if self.direction == "maximize" else min(self.history)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot give one report an epoch from one process."""
        if isinstance(trainer.strategy, ParallelStrategy):
            raise ConfigError(
                f"a search trains each trial in one process, got the strategy {type(trainer.strategy).__name__}; "
                "set trainer.strategy to auto and trainer.devices to 1, and start several workers instead."
            )
        if trainer.max_epochs is not None and trainer.max_epochs > self.epochs:
            raise ConfigError(
                f"trainer.max_epochs is {trainer.max_epochs}, but the study counts {self.epochs} reports a fold."
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the epoch's clock."""
        self._epoch_start = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the epoch, and raise `optuna.TrialPruned` when the pruner says so."""
        if trainer.sanity_checking or trainer.state.fn is not TrainerFn.FITTING:
            return
        if self.monitor not in trainer.callback_metrics:
            raise ConfigError(
                f"the metric {self.monitor!r} is not logged in validation; "
                f"there are: {', '.join(sorted(trainer.callback_metrics)) or 'none'}."
            )
        epoch = trainer.current_epoch
        if epoch != len(self.history) or epoch >= self.epochs:
            raise ConfigError(
                f"expected one validation after each of {self.epochs} epochs, got number {len(self.history) + 1} in "
                f"epoch {epoch + 1}; set trainer.check_val_every_n_epoch to 1 and trainer.val_check_interval to 1.0."
            )
        value = float(trainer.callback_metrics[self.monitor])
        self.seconds.append(time.perf_counter() - self._epoch_start)
        self.history.append(value)
        if not math.isfinite(value):
            self._trial.set_user_attr("nan", str(value))
            self._stop(f"{self.monitor} is {value}", self._step(epoch))
        self._report(epoch)
        self._ask(epoch)

    def close_fold(self) -> float:
        """Report the epochs that early stopping left out, at the fold's final score, and return that score.

        Call it after each `fit`. Without it the curve has gaps, and step-wise comparisons lose this trial.

        Raises:
            optuna.TrialPruned: The pruner, asked once after these reports, says so.
            ConfigError: No epoch was validated.
        """
        score = self.score
        missing = range(len(self.history), self.epochs)
        for epoch in missing:
            self._report(epoch)
        if missing:
            self._ask(self.epochs - 1)
        return score

    def _step(self, epoch: int) -> int:
        return self.fold * self.epochs + epoch + 1

    def _report(self, epoch: int) -> None:
        self._trial.report((math.fsum(self.earlier) + self.score) / (self.fold + 1), step=self._step(epoch))

    def _ask(self, epoch: int) -> None:
        step = self._step(epoch)
        if step < self.folds * self.epochs and self._trial.should_prune():
            self._stop("stopped by the pruner", step)

    def _stop(self, why: str, step: int) -> None:
        for key, value in (("pruned_at", step), ("fold", self.fold), ("epoch", len(self.history) - 1)):
            self._trial.set_user_attr(key, value)
        raise optuna.TrialPruned(f"{why} at report {step} of {self.folds * self.epochs}")
