"""What a trial does: train and validate the model on each fold, report as it goes, and clean up whatever happens."""

from __future__ import annotations

import logging
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

from lightning_bge.callbacks.compile.callback import CompileLayers
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.callbacks.oom import OOMHandler
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import INTERRUPTED
from lightning_bge.hpo.config import BEST
from lightning_bge.hpo.pruning.asha import RESUMES, AshaPruner
from lightning_bge.hpo.pruning.callback import FoldPruningCallback
from lightning_bge.hpo.ranking import CostName, best_points, cost, rank_key
from lightning_bge.hpo.space.search_space import Space, suggest
from lightning_bge.hpo.steps import Report
from lightning_bge.hpo.storage import abandon, mark_alive
from lightning_bge.hpo.trial_checkpoint import EpochThatCounts, Fold, Paused, pause
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.models.metrics import MonitorConfig, Predictions, metric_direction
from lightning_bge.runtime.memory import live_bytes, release
from lightning_bge.runtime.oom import clean_up, find_oom

SEED = "seed_everything"
SLACK = 2**20  # bytes that an out-of-memory trial may leave behind: the libraries' small caches
log = logging.getLogger("lightning_bge")


@dataclass(frozen=True)
class TrialSetup:
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


Build = Callable[[dict[str, Any]], TrialSetup]  # takes settings by their dotted names, and `seed_everything`


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

    All trials see the same folds in the same order with the same seeds, so that their comparison is a paired one. A
    trial with the user attribute `seed` is trained with that `seed_everything` instead, on the same folds.

    Args:
        build: makes fresh objects from a trial's parameters.
        space: what is searched.
        monitor: metric, best or last epoch, patience.
        folds: number of folds; 1 is a single split.
        epochs: the most epochs that any trial trains a fold for.
        oof_dir: where the out-of-fold predictions of the best trials are kept; None keeps none.
        n_trials: how many are to be finished in all.
        compile: when the encoder's layers are compiled.
        per_epoch: reports in each epoch.
        encoder: loads once for all trials of this process.
        cost: what is minimised besides; None: nothing.
        paused_dir: where the pruner `asha` keeps paused trials, a folder each.
    """

    build: Build
    space: Space
    monitor: MonitorConfig
    folds: int
    epochs: int
    oof_dir: Path | None
    n_trials: int = 1
    compile: CompileConfig = CompileConfig()  # noqa: RUF009 - frozen
    per_epoch: int = 1
    encoder: EncoderCache = field(default_factory=EncoderCache)
    cost: CostName | None = None
    paused_dir: Path | None = None

    def __call__(self, trial: optuna.Trial) -> float | tuple[float, float]:
        """Train all folds; the trial's value is the mean of their scores, and where there is a cost, that as well.

        Raises:
            optuna.TrialPruned: the pruner stopped it.
        """
        mark_alive(trial)
        held, loads = self._held(), self.encoder.loads
        try:
            params, seed = suggest(trial, self.space), trial.user_attrs.get("seed")
            return self._run(trial, params if seed is None else {**params, SEED: seed})
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
            if self.encoder.loads > loads:
                self.encoder.let_go()
            clean_up(error)
        for name in ("where", "kind", "requested", "free", "text"):
            trial.set_user_attr(f"oom_{name}", getattr(failed, name))
        kept = self._held() - held
        if kept > SLACK:
            trial.set_user_attr("memory_kept", kept)
        raise optuna.TrialPruned(str(failed))

    def _held(self) -> int:
        """Bytes of live tensors, less the warm encoder's."""
        return live_bytes() - self.encoder.nbytes

    def _run(self, trial: optuna.Trial, params: dict[str, Any]) -> float | tuple[float, float]:
        paused = self._paused(trial)
        folds: list[Fold] = [] if paused is None else paused.folds
        curve: list[list[Report]] = [] if paused is None else paused.curve[:-1]
        try:
            while len(folds) < self.folds:
                folds.append(self._fold(trial, params, folds, curve, paused))
                paused = None
        finally:
            release(host=False)  # trainer and module hold each other until the garbage collector has run
            trial.set_user_attr("curve", curve)
        scores = [done.score for done in folds]
        trial.set_user_attr("fold_scores", scores)
        trial.set_user_attr("fold_epochs", [done.epochs for done in folds])
        value = sum(scores) / len(scores)
        values = (value,) if self.cost is None else (value, cost(self.cost, curve, [done.rows for done in folds]))
        if self.oof_dir is not None and _is_among_best(trial, values):
            self.oof_dir.mkdir(parents=True, exist_ok=True)
            found = [done.predictions for done in folds if done.predictions]
            save_predictions(found, predictions_file(self.oof_dir, trial.number))
            drop_predictions(trial.study, self.oof_dir)
        return value if len(values) == 1 else values

    def _paused(self, trial: optuna.Trial) -> Paused | None:
        """What the trial goes on with, its reports made for this one too; None: it is no resumed one."""
        number = trial.user_attrs.get(RESUMES)
        if number is None:
            return None
        assert self.paused_dir is not None
        paused = Paused.load(self.paused_dir / str(number))
        if paused is None:
            # there was no room for it, or it could not be resumed any more, and then hpo.n_trials was raised
            log.warning(
                "trial %d: the checkpoint of trial %d is gone; it is trained from its start", trial.number, number
            )
            return None
        for step, value in trial.study.get_trials(deepcopy=False)[number].intermediate_values.items():
            trial.report(value, step)
        return paused

    def _fold(
        self,
        trial: optuna.Trial,
        params: dict[str, Any],
        done: list[Fold],
        curve: list[list[Report]],
        paused: Paused | None,
    ) -> Fold:
        metric, direction = f"val_{self.monitor.metric}", metric_direction(str(self.monitor.metric))
        counts = EpochThatCounts(metric, self.monitor.objective, direction)

        def write(trainer: Trainer | None) -> None:
            study = trial.study
            assert self.paused_dir is not None
            assert isinstance(study.pruner, AshaPruner)
            if study.pruner.can_be_resumed(study, study.get_trials(deepcopy=False)[trial.number], self.n_trials):
                pause(self.paused_dir / str(trial.number), trainer, done, curve, reports, counts)

        reports = FoldPruningCallback(
            trial,
            metric,
            fold=len(done),
            folds=self.folds,
            epochs=self.epochs,
            earlier=[fold.score for fold in done],
            objective=self.monitor.objective,
            direction=direction,
            per_epoch=self.per_epoch,
            pause=write if isinstance(trial.study.pruner, AshaPruner) else None,
        )
        curve.append(reports.curve)
        if paused is not None:
            paused.restore(reports, counts)
        setup = self.build(params)
        setup.datamodule.select_fold(len(done))
        if not reports.closed:
            compiler = CompileLayers(
                self.compile, steps_left=self._steps_left(trial.study, setup.datamodule, len(done))
            )
            callbacks = [OOMHandler(), compiler, counts, *early_stopping(self.monitor), reports, LetGo()]
            setup.model.load = self.encoder.load
            checkpoint = None if paused is None else paused.checkpoint
            setup.make_trainer(callbacks=callbacks).fit(
                setup.model, datamodule=setup.datamodule, ckpt_path=checkpoint, weights_only=True
            )
        return Fold(reports.close_fold(), counts.epochs, counts.predictions, len(setup.datamodule.val_rows))

    def _steps_left(self, study: optuna.Study, data: TextDataModule, fold: int) -> int:
        """Optimizer steps that this process has still to make, if trials go on being pruned as they were so far."""
        steps = -(-len(data.train_rows) // data.batch_size) * self.epochs
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        reports = sum(len(trial.intermediate_values) for trial in ended)
        share = reports / (len(ended) * self.folds * self.epochs * self.per_epoch) if reports else 1.0
        workers = len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
        later = max(self.n_trials - len(ended) - 1, 0) * self.folds * share / max(workers, 1)
        return round(steps * (self.folds - fold + later))


def early_stopping(monitor: MonitorConfig) -> list[Callback]:
    """Lightning's early stopping, where a patience is set."""
    if monitor.patience is None:
        return []
    mode = "max" if metric_direction(str(monitor.metric)) == "maximize" else "min"
    # a NaN is the reports' to judge: they prune the trial and say so
    return [EarlyStopping(f"val_{monitor.metric}", mode=mode, patience=monitor.patience, check_finite=False)]


def _is_among_best(trial: optuna.Trial, values: Sequence[float]) -> bool:
    """Whether it is one of the best points now. Where not, it will never be."""
    key = rank_key(trial.study, trial.number, values)
    best = best_points(trial.study, BEST)
    better = [other for other in best if rank_key(trial.study, other.number, other.values) < key]
    return len(better) < BEST and all(other.params != trial.params for other in better)


def predictions_file(oof_dir: Path, number: int) -> Path:
    """Where a trial's out-of-fold predictions are."""
    return oof_dir / f"{number}.safetensors"


def drop_predictions(study: optuna.Study, oof_dir: Path) -> None:
    """Delete the predictions of trials that have ended and are not among the best points."""
    # in this order: others may end trials meanwhile, and what has ended and is not among the best now never will be
    ended = {trial.number for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()}
    kept = {trial.number for trial in best_points(study, BEST)}
    for path in oof_dir.glob("*.safetensors"):
        if path.stem.isdecimal() and int(path.stem) in ended - kept:
            path.unlink(missing_ok=True)


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
