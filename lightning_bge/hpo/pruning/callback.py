"""Reports the validations of a trial to its study: one consecutive curve over folds, epochs and parts of epochs."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import optuna
import torch
from optuna_integration import PyTorchLightningPruningCallback

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.steps import Report
from lightning_bge.hpo.trials import PAUSED_AT
from lightning_bge.runtime.distributed import as_the_first_decides


class FoldPruningCallback(PyTorchLightningPruningCallback):
    """Report once or several times in each epoch of one fold, and stop the fit when the study's pruner decides so.

    `FoldPruningCallback(trial, monitor)`, without `epochs`, does what `PyTorchLightningPruningCallback` does, with
    several processes too: there is one fit, and the steps are its epochs, from 0. All that follows is with `epochs`.

    With P reports an epoch, part p (from 1) of epoch e (from 0) of fold k has step `(k * epochs + e) * P + p`, so that
    the steps of a trial run through 1..folds*epochs*P. Part p is validated after the first p/P of the epoch's batches,
    rounded up; where an epoch has fewer batches than parts, one validation counts for several steps. A step's value is
    the mean over the earlier folds' final scores and this fold's score so far. The pruner is not asked at the last step
    of all, where nothing is left to save.

    A fold's score comes from whole epochs alone, so that it does not depend on the number of reports; within an epoch
    the objective `best` reports the present value where it is better than all whole epochs before.

    A value that is NaN or infinite is not reported: the trial is pruned at once, with the value as text in the user
    attribute `nan`. Optuna's TPE then ranks it by its last finite report, or last of all if it has none. A pruned
    trial has the user attributes `pruned_at` (the step), `fold` and `epoch` (the last one trained; both from 0).

    A study of two objectives, for which Optuna supports neither reports nor a pruner, is trained without reports.

    Works with any LightningModule that logs `monitor` in validation, of `lightning.pytorch` or `pytorch_lightning`.
    With several processes each has this callback; the first one reports, and what it decides holds for all of them,
    which have to log the same value (`sync_dist=True`). `pause` is called in each of them. Between reports of one epoch
    it sets `trainer.val_check_batch`; early stopping still counts epochs.

    Args:
        trial: The running trial.
        monitor: Name of the validation metric.
        fold: This fold, from 0.
        folds: Number of folds of the trial.
        epochs: Epochs of a fold at most, the same for all trials of a study. None: there are no folds.
        earlier: Final scores of the folds before this one: `fold` numbers.
        objective: A fold's score: its `best` epoch so far, or its `last`.
        direction: `maximize` or `minimize`.
        per_epoch: Reports in each epoch; 1 costs nothing, as that validation is made anyway.
        pause: Called before the trial stops because the pruner decides so, with the trainer, or with None where the
            fold has made its last report: it writes what is needed to resume the trial. None: the trial ends for good,
            and `paused_at` is not set.

    Attributes:
        history: The metric's value for each whole epoch so far.
        curve: All validations so far, within epochs as well.

    Raises:
        ConfigError: In the constructor for values that contradict each other; in `fit` when the metric is missing, or
            validation does not run exactly once an epoch.
    """

    def __init__(
        self,
        trial: optuna.Trial,
        monitor: str,
        fold: int = 0,
        folds: int = 1,
        epochs: int | None = None,
        earlier: Sequence[float] = (),
        objective: Literal["best", "last"] = "best",
        direction: Literal["maximize", "minimize"] = "maximize",
        per_epoch: int = 1,
        pause: Callable[[pl.Trainer | None], None] | None = None,
    ) -> None:
        super().__init__(trial, monitor)
        self.trial = trial
        if epochs is None and (folds > 1 or per_epoch > 1 or pause is not None):
            raise ConfigError("epochs: expected the most epochs of a fold with folds, per_epoch or pause, got None.")
        self._plain, epochs = epochs is None, 1 if epochs is None else epochs
        if epochs < 1 or per_epoch < 1 or not 0 <= fold < folds:
            raise ConfigError(
                f"expected epochs and per_epoch >= 1 and 0 <= fold < folds, got {epochs=}, {per_epoch=}, {fold=}, "
                f"{folds=}."
            )
        if len(earlier) != fold:
            raise ConfigError(
                f"earlier: expected the scores of the {fold} folds before fold {fold}, got {len(earlier)}."
            )
        if objective not in ("best", "last") or direction not in ("maximize", "minimize"):
            raise ConfigError(
                "expected objective 'best' or 'last' and direction 'maximize' or 'minimize', "
                f"got {objective!r} and {direction!r}."
            )
        self.fold, self.folds, self.epochs, self.per_epoch = fold, folds, epochs, per_epoch
        self.earlier = tuple(earlier)
        self.objective, self.direction = objective, direction
        self._all = folds * epochs * per_epoch
        self._pause = pause
        self._single = len(trial.study.directions) == 1
        self.history: list[float] = []
        self.curve: list[Report] = []
        self._parts = 0  # of this fold, reported
        self._within = False  # whether the last of them is within an epoch
        self._since = self._validated = _clocks()
        self._ranks, self._reports = 1, True  # how many processes there are, and whether this is the first

    @property
    def score(self) -> float:
        """This fold's score so far.

        Raises:
            ConfigError: No epoch was validated yet.
        """
        if not self.history:
            text = f"fold {self.fold} ended before a validation; train for at least one epoch"
            raise ConfigError(
                "epochs: a fold's score needs the most epochs of a fold, got None." if self._plain else text
            )
        return self.history[-1] if self.objective == "last" else self._better(self.history)

    def _better(self, values: Sequence[float]) -> float:
        return max(values) if self.direction == "maximize" else min(values)

    @property
    def closed(self) -> bool:
        """Whether all reports of the fold are made."""
        return self._parts == self.epochs * self.per_epoch

    @property
    def last_step(self) -> int:
        """The trial's last step that was reported."""
        return self._step(self._parts)

    def state(self) -> dict[str, Any]:
        """What another callback needs to resume this fold, besides `curve`: plain data."""
        return {"history": list(self.history), "parts": self._parts, "within": self._within}

    def restore(self, state: dict[str, Any], curve: Sequence[Report]) -> None:
        """Continue a fold of a paused or stopped trial, whose reports so far this trial has taken over already.

        Args:
            state: the `state` of the callback that stopped.
            curve: the `curve` of that callback.
        """
        self.history, self._parts, self._within = list(state["history"]), state["parts"], state["within"]
        self.curve[:] = curve

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse more epochs than the study counts."""
        if self._plain:
            super().on_fit_start(trainer, pl_module)
            return
        self._ranks, self._reports = trainer.world_size, trainer.is_global_zero
        if trainer.max_epochs is not None and trainer.max_epochs > self.epochs:
            raise ConfigError(
                f"trainer.max_epochs: expected at most epochs={self.epochs}, for which the study has steps, "
                f"got {trainer.max_epochs}."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give early stopping the last value, where a fold is resumed at an epoch's end."""
        if self.curve:
            trainer.callback_metrics[self.monitor] = torch.tensor(self.curve[-1].value)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the batch after which the next part of the epoch is validated."""
        if self.per_epoch == 1:
            return
        batches = trainer.num_training_batches
        if not math.isfinite(batches) or trainer.val_check_interval != 1.0:
            raise ConfigError(
                f"{self.per_epoch} reports an epoch need epochs of a known length and trainer.val_check_interval 1.0, "
                f"got {batches} batches and {trainer.val_check_interval}."
            )
        # Lightning validates where the number of batches so far is a multiple of this: at this end alone
        trainer.val_check_batch = next(end for end in self._ends(int(batches)) if end > batch_idx)

    def _ends(self, batches: int) -> list[int]:
        return [-(-batches * part // self.per_epoch) for part in range(1, self.per_epoch + 1)]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the time at which training stopped."""
        self._validated = _clocks()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the epoch or its part, and raise `optuna.TrialPruned` when the pruner decides so."""
        if self._plain:
            super().on_validation_end(trainer, pl_module)
            return
        # compared as a text, as `pytorch_lightning` has an enumeration of its own
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            raise ConfigError(
                f"the metric {self.monitor!r} is not logged in validation; "
                f"logged are: {', '.join(sorted(trainer.callback_metrics)) or 'none'}."
            )
        parts, whole = self._parts_done(trainer)
        value = float(trainer.callback_metrics[self.monitor])
        now = _clocks()
        spent = [b - a for a, b in zip(self._since, self._validated, strict=True)]
        tested = [b - a for a, b in zip(self._validated, now, strict=True)]
        found = trainer.callback_metrics.get("val_loss")
        loss = None if found is None else float(found)
        self.curve.append(Report(self._step(parts), value, spent[0], tested[0], spent[1], tested[1], loss))
        self._since = now
        self._within = not whole
        if whole:
            self.history.append(value)
        if self._shared(not math.isfinite(value)):
            self._note("nan", str(value))
            self._stop(f"{self.monitor} is {value}", self._step(parts))
        seen = self.history if whole or self.objective == "last" else [*self.history, value]
        self._report(parts, value if self.objective == "last" else self._better(seen))
        self._ask(trainer)

    def _parts_done(self, trainer: pl.Trainer) -> tuple[int, bool]:
        """How many parts of the fold are trained at this validation, and whether the epoch is complete."""
        epoch, batch = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx + 1
        ends = [batch] if self.per_epoch == 1 else self._ends(int(trainer.num_training_batches))
        parts = epoch * self.per_epoch + sum(end <= batch for end in ends)
        if epoch != len(self.history) or epoch >= self.epochs or parts <= self._parts:
            raise ConfigError(
                f"expected one validation after each of {self.epochs} epochs, got number {len(self.curve) + 1} in "
                f"epoch {epoch + 1}; set trainer.check_val_every_n_epoch to 1 and trainer.val_check_interval to 1.0."
            )
        return parts, parts == (epoch + 1) * self.per_epoch

    def close_fold(self) -> float:
        """Report the epochs that early stopping left out, with the fold's final score, and return that score.

        Call it after each `fit`. Without it the curve has gaps, and comparisons at a step leave out this trial.

        Raises:
            optuna.TrialPruned: The pruner, asked once after these reports, decides so.
            ConfigError: No epoch was validated.
        """
        score = self.score
        if self._parts < self.epochs * self.per_epoch:
            self._report(self.epochs * self.per_epoch, score)
            self._ask()
        return score

    def _step(self, part: int) -> int:
        return self.fold * self.epochs * self.per_epoch + part

    def _report(self, parts: int, score: float) -> None:
        """Report this fold's score so far for all parts up to this one."""
        for part in range(self._parts + 1, parts + 1) if self._single and self._reports else ():
            self.trial.report((math.fsum(self.earlier) + score) / (self.fold + 1), step=self._step(part))
        self._parts = parts

    def _ask(self, trainer: pl.Trainer | None = None) -> None:
        step = self._step(self._parts)
        if step >= self._all or not self._single or not self._shared(self._reports and self.trial.should_prune()):
            return
        if self._pause is not None:
            # first: from here on the trial is known to pause, also if its process dies before the checkpoint is written
            self._note(PAUSED_AT, step)
            self._pause(None if self.closed else trainer)
        self._stop("stopped by the pruner", step)

    def _shared(self, decision: bool) -> bool:
        """What the first process decides."""
        return as_the_first_decides(decision) if self._ranks > 1 else decision

    def _note(self, name: str, value: Any) -> None:
        """Write a user attribute of the trial, once."""
        if self._reports:
            self.trial.set_user_attr(name, value)

    def _stop(self, why: str, step: int) -> None:
        epoch = len(self.history) - 1 + self._within
        for key, value in (("pruned_at", step), ("fold", self.fold), ("epoch", epoch)):
            self._note(key, value)
        raise optuna.TrialPruned(f"{why} at step {step} of {self._all}")


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
