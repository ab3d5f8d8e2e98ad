"""What a trial does: train and validate the model on each fold, report as it goes, and clean up whatever happens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from optuna.trial import TrialState
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_bge.callbacks import Compile, CompileConfig, OomRecorder
from lightning_bge.callbacks.oom import drop_locals
from lightning_bge.data import TextDataModule
from lightning_bge.hpo.reports import FoldPruningCallback
from lightning_bge.hpo.space import Space, suggest
from lightning_bge.hpo.storage import abandon, mark_alive
from lightning_bge.memory import find_oom, live_bytes, release
from lightning_bge.models import BGEClassifier, WarmEncoder
from lightning_bge.models.metrics import MonitorConfig, Predictions, metric_direction

SLACK = 2**20  # bytes that an out-of-memory trial may leave behind: the libraries' small caches
INTERRUPTED = 130  # a shell's exit status for Ctrl-C


@dataclass(frozen=True)
class Setup:
    """Fresh objects for one set of settings.

    Attributes:
        model: not yet built: it loads its encoder when it is first trained.
        datamodule: set up for `fit`.
        make_trainer: called with `callbacks` and any of the trainer's arguments.
        config: returns all settings, as plain data that `fit` takes.
    """

    model: BGEClassifier
    datamodule: TextDataModule
    make_trainer: Callable[..., Trainer]
    config: Callable[[], dict[str, Any]]


Build = Callable[[dict[str, Any]], Setup]


@dataclass(frozen=True)
class Fold:
    """What is kept of a fold: no callback, as Lightning ties those to module, trainer and optimizer.

    Attributes:
        score: what counts for the trial.
        epochs: the epoch it comes from, from 1.
        predictions: of that epoch.
    """

    score: float
    epochs: int
    predictions: Predictions | None


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
        self._best = -float("inf")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep this epoch's predictions where they are the ones that count so far."""
        value = self.sign * float(trainer.callback_metrics.get(self.monitor, float("nan")))
        if self.objective == "last" or value > self._best:
            self._best, self.epochs = value, trainer.current_epoch + 1
            self.predictions = pl_module.predictions  # type: ignore[assignment]


class LetGo(Callback):
    """Takes the encoder out of the module when training ends, so that Lightning does not move it off its device."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training ran to its end."""
        pl_module.net = None  # type: ignore[assignment]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The trial was pruned, failed or stopped."""
        pl_module.net = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Objective:
    """An Optuna objective over folds.

    All trials see the same folds in the same order with the same seeds, so that their comparison is a paired one.

    Args:
        build: makes fresh objects from a trial's parameters.
        space: what is searched.
        monitor: metric, best or last epoch, patience.
        folds: number of folds; 1 is a single split.
        epochs: the most epochs that any trial trains a fold for.
        oof_dir: where the out-of-fold predictions of trials that were best when they ended are kept.
        trials: how many are to be finished in all.
        compile: when the encoder's layers are compiled.
        encoder: loads once for all trials of this process.
    """

    build: Build
    space: Space
    monitor: MonitorConfig
    folds: int
    epochs: int
    oof_dir: Path
    trials: int = 1
    compile: CompileConfig = CompileConfig()  # noqa: RUF009 - frozen
    encoder: WarmEncoder = field(default_factory=WarmEncoder)

    def __call__(self, trial: optuna.Trial) -> float:
        """Train all folds; the trial's value is the mean of their scores.

        Raises:
            optuna.TrialPruned: the pruner stopped it.
        """
        mark_alive(trial)
        held, loads = self._held(), self.encoder.loads
        try:
            return self._run(trial, suggest(trial, self.space))
        except optuna.TrialPruned:
            raise
        except (KeyboardInterrupt, SystemExit) as stop:
            # Lightning turns Ctrl-C in `fit` into SystemExit, which Optuna does not catch: the trial would stay
            # RUNNING. KeyboardInterrupt it catches, and would end a trial that is ended here already.
            abandon(trial.study, trial.number, f"interrupted: {type(stop).__name__}", max_retries=sys.maxsize)
            raise SystemExit(INTERRUPTED) from stop
        except Exception as error:
            failed = find_oom(error)
            if failed is None:
                raise
            drop_locals(error)
        # Only here: as long as the error was handled it held what the trial had computed.
        if self.encoder.loads > loads:
            self.encoder.let_go()
        release()
        for name in ("where", "kind", "asked", "free", "text"):
            trial.set_user_attr(f"oom_{name}", getattr(failed, name))
        kept = self._held() - held
        if kept > SLACK:
            trial.set_user_attr("memory_kept", kept)
        raise optuna.TrialPruned(str(failed))

    def _held(self) -> int:
        """Bytes of live tensors, less the warm encoder's."""
        return live_bytes() - self.encoder.nbytes

    def _run(self, trial: optuna.Trial, params: dict[str, Any]) -> float:
        folds: list[Fold] = []
        try:
            for fold in range(self.folds):
                folds.append(self._fold(trial, params, fold, [done.score for done in folds]))
        finally:
            release(host=False)  # trainer and module hold each other until the garbage collector has run
        scores = [done.score for done in folds]
        trial.set_user_attr("fold_scores", scores)
        trial.set_user_attr("fold_epochs", [done.epochs for done in folds])
        value = sum(scores) / len(scores)
        if self._is_best(trial.study, value):
            self.oof_dir.mkdir(parents=True, exist_ok=True)
            found = [done.predictions for done in folds if done.predictions]
            save_predictions(found, self.oof_dir / f"{trial.number}.safetensors")
        return value

    def _fold(self, trial: optuna.Trial, params: dict[str, Any], fold: int, earlier: Sequence[float]) -> Fold:
        setup = self.build(params)
        setup.datamodule.select_fold(fold)
        metric, direction = f"val_{self.monitor.metric}", metric_direction(str(self.monitor.metric))
        counts = EpochThatCounts(metric, self.monitor.objective, direction)
        reports = FoldPruningCallback(
            trial,
            metric,
            fold=fold,
            folds=self.folds,
            epochs=self.epochs,
            earlier=earlier,
            objective=self.monitor.objective,
            direction=direction,
        )
        compiler = Compile(self.compile, steps_left=self._steps_left(trial.study, setup.datamodule, fold))
        callbacks = [OomRecorder(), compiler, counts, *early_stopping(self.monitor), reports, LetGo()]
        setup.model.load = self.encoder.load
        setup.make_trainer(callbacks=callbacks).fit(setup.model, datamodule=setup.datamodule)
        return Fold(reports.close_fold(), counts.epochs, counts.predictions)

    def _steps_left(self, study: optuna.Study, data: TextDataModule, fold: int) -> int:
        """Optimizer steps that this process has still to make, if trials go on being pruned as they were so far."""
        steps = -(-len(data.train_rows) // data.batch_size) * self.epochs
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        reports = sum(len(trial.intermediate_values) for trial in ended)
        share = reports / (len(ended) * self.folds * self.epochs) if reports else 1.0
        workers = len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
        later = max(self.trials - len(ended) - 1, 0) * self.folds * share / max(workers, 1)
        return round(steps * (self.folds - fold + later))

    def _is_best(self, study: optuna.Study, value: float) -> bool:
        done = [t.value for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if t.value is not None]
        if study.direction == optuna.study.StudyDirection.MINIMIZE:
            return value <= min(done, default=value)
        return value >= max(done, default=value)


def early_stopping(monitor: MonitorConfig) -> list[Callback]:
    """Lightning's early stopping, where a patience is set."""
    if monitor.patience is None:
        return []
    mode = "max" if metric_direction(str(monitor.metric)) == "maximize" else "min"
    # a NaN is the reports' to judge: they prune the trial and say so
    return [EarlyStopping(f"val_{monitor.metric}", mode=mode, patience=monitor.patience, check_finite=False)]


def save_predictions(folds: Sequence[Predictions], path: Path) -> None:
    """Write the folds' predictions as one safetensors file, whole or not at all."""
    tensors: dict[str, Tensor] = {
        "rows": torch.cat([p.rows for p in folds]),
        "logits": torch.cat([p.logits for p in folds]),
        "labels": torch.cat([p.labels for p in folds if p.labels is not None]),
        "fold": torch.cat([torch.full((len(p.rows),), k) for k, p in enumerate(folds)]),
    }
    groups = [p.groups for p in folds if p.groups is not None]
    if groups:
        tensors["groups"] = torch.cat(groups)
    draft = path.with_suffix(".draft")
    save_file(tensors, draft)
    draft.replace(path)


def load_predictions(path: Path) -> tuple[Predictions, Tensor]:
    """Read what `save_predictions` wrote: the predictions, sorted by row, and each row's fold, int64 [N]."""
    tensors = load_file(path)
    order = tensors["rows"].argsort()
    found = Predictions(
        tensors["rows"][order],
        tensors["logits"][order],
        tensors["labels"][order],
        tensors["groups"][order] if "groups" in tensors else None,
    )
    return found, tensors["fold"][order]
