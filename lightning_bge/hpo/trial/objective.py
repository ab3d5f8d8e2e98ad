"""What a trial does: train and validate the model on each fold, report to the study, and clean up however it ends."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pickle import UnpicklingError
from typing import Any

import optuna
from lightning.pytorch import Callback, Trainer
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.callbacks.oom import OOMHandler
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.pruning.asha import AshaPruner
from lightning_bge.hpo.pruning.callback import FoldPruningCallback
from lightning_bge.hpo.pruning.oom import prune_out_of_memory
from lightning_bge.hpo.ranking import CostName, cost
from lightning_bge.hpo.space.search_space import Space, suggest
from lightning_bge.hpo.steps import Report, Steps
from lightning_bge.hpo.terminator import report_fold_scores
from lightning_bge.hpo.trackers.tracking import Tracking
from lightning_bge.hpo.trial.checkpoint import FoldResult, OpenFold, SavedTrial, ScoredEpoch, save_trial
from lightning_bge.hpo.trial.fold_callbacks import LiveCurve, StopOnRequest, early_stopping
from lightning_bge.hpo.trial.kept_predictions import KeptPredictions, limit_predictions
from lightning_bge.hpo.trial.out_of_fold import drop_predictions, save_predictions
from lightning_bge.hpo.trial.ranks import (
    FoldTask,
    FollowedTrial,
    RankGroup,
    pause_with_others,
    save_with_others,
)
from lightning_bge.hpo.trial.score import Monitor
from lightning_bge.hpo.trial.setup import Build, TrialSetup
from lightning_bge.hpo.trials import ENDED, PARAMETER_SET, RESUMES
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.runtime.distributed import as_the_first_decides
from lightning_bge.runtime.locations import Location, local_copy
from lightning_bge.runtime.memory import release
from lightning_bge.runtime.oom import find_oom
from lightning_bge.runtime.stop import Stopped, StopRequest

SEED = "seed_everything"
log = logging.getLogger("lightning_bge")


@dataclass(frozen=True)
class TrialFiles:
    """Folders of what trials leave, on this machine or elsewhere; None: nothing is kept.

    Attributes:
        out_of_fold: the out-of-fold predictions of the best trials, a file each.
        checkpoints: what is needed to continue trials that were paused or stopped, a folder for each parameter set.
        predictions: the logits of all validations, a file for each parameter set.
        predictions_limit: bytes of `predictions` together, beyond which those that matter least are deleted.
    """

    out_of_fold: Location | None = None
    checkpoints: Location | None = None
    predictions: Location | None = None
    predictions_limit: int = 2**30

    def within(self, name: str) -> TrialFiles:
        """The same folders' sub-folders of that name, without the out-of-fold predictions."""
        checkpoints, predictions = (
            None if folder is None else folder / name for folder in (self.checkpoints, self.predictions)
        )
        return TrialFiles(None, checkpoints, predictions, self.predictions_limit)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """An Optuna objective over folds.

    All trials have the same folds in the same order with the same seeds, so that their comparison is a paired one. A
    trial with the user attribute `seed` is trained with that `seed_everything` instead, on the same folds.

    Args:
        build: makes fresh objects from a trial's parameters.
        space: the search space.
        monitor: metric, best or last epoch, patience.
        steps: number of folds (1 is a single split), the most epochs of each, and reports in each epoch.
        files: what trials leave on the disk.
        n_trials: how many trials the study has in all.
        compile: when the encoder's layers are compiled.
        encoder: loads the encoders of all trials of this process.
        weights_only: whether checkpoints hold tensors and plain data alone.
        ranks: the processes that train each trial together, of which this is the first; None: it is the only one.
        cost: what is minimised besides the score; None: nothing.
        request: whether to stop; a trial is then saved in the middle of a fold.
        tracking: the runs of the trials in experiment trackers.
    """

    build: Build
    space: Space
    monitor: Monitor
    steps: Steps
    files: TrialFiles = TrialFiles()
    n_trials: int = 1
    compile: CompileConfig = CompileConfig()  # noqa: RUF009 - frozen
    encoder: EncoderCache = field(default_factory=EncoderCache)
    weights_only: bool = True
    ranks: RankGroup | None = None
    cost: CostName | None = None
    request: StopRequest = field(default_factory=StopRequest)
    tracking: Tracking = field(default_factory=Tracking)

    def __call__(self, trial: optuna.Trial) -> float | tuple[float, float]:
        """Train all folds; the trial's value is the mean of their scores, and where there is a cost, that as well.

        Raises:
            optuna.TrialPruned: the pruner stopped it.
            Stopped: as requested; with `files.checkpoints` it can be continued.
        """
        with prune_out_of_memory(trial, shared=lambda: self.encoder.nbytes):
            loads = self.encoder.loads
            try:
                params, seed = suggest(trial, self.space), trial.user_attrs.get("seed")
                self.tracking.begin(trial)
                return self._run(trial, params if seed is None else {**params, SEED: seed})
            except Exception as error:
                if self.encoder.loads > loads and find_oom(error) is not None:
                    self.encoder.clear()  # it may be what did not fit
                raise

    def _run(self, trial: optuna.Trial, params: dict[str, Any]) -> float | tuple[float, float]:
        saved = self._saved(trial)
        folds: list[FoldResult] = [] if saved is None else saved.folds
        curve: list[list[Report]] = [] if saved is None else saved.curve
        later, kept = self._later_folds(trial.study), self._kept(trial, saved)
        try:
            while len(folds) < self.steps.folds:
                opened = None if saved is None else saved.fold
                folds.append(self._fold(trial, params, folds, curve, opened, later, kept))
                saved = None
                if (folder := self._folder(trial)) is not None:
                    _check_running(trial)
                    save_trial(folder, step=len(folds) * self.steps.per_fold, folds=folds, curve=curve)
        finally:
            release(host=False)  # trainer and module hold each other until the garbage collector has run
            trial.set_user_attr("curve", curve)
            self.tracking.report(trial, curve)
            self.tracking.flush()  # the run is there when others see that the trial has ended
            if kept is not None:
                limit_predictions(kept.folder, trial.study, self.files.predictions_limit)
        scores = [fold.score for fold in folds]
        trial.set_user_attr("fold_scores", scores)
        trial.set_user_attr("fold_epochs", [fold.epochs for fold in folds])
        if len(scores) > 1 and self.cost is None:  # for `hpo.terminator`
            report_fold_scores(trial, scores)
        value = sum(scores) / len(scores)
        if self.files.out_of_fold is not None:
            predictions = [fold.predictions for fold in folds if fold.predictions]
            save_predictions(predictions, self.files.out_of_fold, trial.number)
            drop_predictions(trial.study, self.files.out_of_fold)
        return (
            value if self.cost is None else (value, cost(self.cost, curve, [fold.rows for fold in folds if fold.rows]))
        )

    def _folder(self, trial: optuna.Trial) -> Location | None:
        """Where the trial is saved; None: nowhere."""
        folder = self.files.checkpoints
        return None if folder is None else folder / str(trial.user_attrs.get(PARAMETER_SET, trial.number))

    def _kept(self, trial: optuna.Trial, saved: SavedTrial | None) -> KeptPredictions | None:
        """The logits of this parameter set's validations so far; None: they are not kept."""
        folder = self.files.predictions
        if folder is None:
            return None
        number = trial.user_attrs.get(PARAMETER_SET, trial.number)
        return KeptPredictions(folder, number, until=0 if saved is None else saved.step)

    def _saved(self, trial: optuna.Trial) -> SavedTrial | None:
        """What another trial has left of this parameter set; None: nothing."""
        folder, known = self._folder(trial), trial.user_attrs
        saved = None if folder is None or PARAMETER_SET not in known else SavedTrial.load(folder)
        if saved is None and RESUMES in known:
            # the disk had no room for it, or it could not be resumed any more and then hpo.n_trials was raised
            text = "trial %d: the checkpoint of trial %d was deleted; training starts from the first epoch"
            log.warning(text, trial.number, known[RESUMES])
        return saved

    def _fold(
        self,
        trial: optuna.Trial,
        params: dict[str, Any],
        done: list[FoldResult],
        curve: list[list[Report]],
        opened: OpenFold | None,
        later: float,
        kept: KeptPredictions | None,
    ) -> FoldResult:
        scored = ScoredEpoch(self.monitor.logged, self.monitor.objective, self.monitor.direction)
        before = 0 if opened is None else len(opened.curve)

        def keep() -> None:
            if kept is not None:
                kept.add(reports.curve[before:], scored.logits)

        def save(trainer: Trainer | None) -> None:
            _check_running(trial)
            keep()  # first: what is continued from the checkpoint has all predictions until then
            if (folder := self._folder(trial)) is not None:
                save_trial(folder, step=reports.last_step, folds=done, curve=curve, fold=(reports, scored, trainer))

        reports = self._reports(trial, done, save)
        curve.append(reports.curve)
        if opened is not None:
            reports.restore(opened.reports, opened.curve)
            scored.restore(opened.scored)
        setup = self.build(params)
        setup.begin_fold(len(done), [fold.predictions for fold in done if fold.predictions is not None])
        if not reports.closed:
            stop = StopOnRequest(self.request, save, setup.resumes_within_epochs)
            live = LiveCurve(lambda: self.tracking.report(trial, curve))
            steps_left = self._steps_left(later, setup, len(done))
            callbacks: list[Callback] = [
                OOMHandler(),
                *setup.first_callbacks(self.compile, self.encoder, steps_left),
                scored,
                *early_stopping(self.monitor),
                *(reports, live, stop),
                *setup.last_callbacks(),
            ]
            task = None if self.ranks is None else self._task(trial, params, done, reports, steps_left)
            try:
                self._fit(setup, callbacks, None if opened is None else opened.checkpoint, task)
            finally:
                keep()
        with self._in_step():
            score = reports.close_fold()
        return FoldResult(score, scored.epochs, scored.predictions, setup.n_validation_rows)

    def _fit(self, setup: TrialSetup, callbacks: list[Callback], saved: Location | None, task: FoldTask | None) -> None:
        """Train a fold, with the other processes of the trial where there is a task for them."""
        try:
            with self._in_step(), nullcontext() if saved is None else local_copy(saved) as checkpoint:
                if self.ranks is not None and task is not None:
                    self.ranks.send(replace(task, checkpoint=None if checkpoint is None else str(checkpoint)))
                setup.make_trainer(callbacks=callbacks).fit(
                    setup.model, datamodule=setup.datamodule, ckpt_path=checkpoint, weights_only=self.weights_only
                )
        except UnpicklingError as error:
            named = re.search(r"GLOBAL (\S+)", str(error))
            raise ConfigError(
                f"hpo.weights_only: the checkpoint {saved} holds objects that the module has added"
                f"{f', such as {named[1]}' if named else ''}. Set hpo.weights_only to false if you trust all who can "
                "write into the run folder, or hpo.pruner.name to median, which does not pause trials"
            ) from error

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """What the processes of a trial do together: an error leaves them out of step, unless it ends all of them."""
        try:
            yield
        except (optuna.TrialPruned, Stopped):
            raise
        except Exception:
            if self.ranks is not None:
                self.ranks.check()
            raise

    def _task(
        self,
        trial: optuna.Trial,
        params: dict[str, Any],
        done: list[FoldResult],
        reports: FoldPruningCallback,
        steps_left: int | None,
    ) -> FoldTask:
        """What the other processes of this one's trials need to train the fold with it."""
        return FoldTask(
            params=params,
            earlier=[(fold.score, fold.predictions) for fold in done],
            reports=reports.state(),
            curve=[tuple(report) for report in reports.curve],
            steps_left=steps_left,
            pauses=isinstance(trial.study.pruner, AshaPruner),
            n_objectives=len(trial.study.directions),
        )

    def follow(self, task: FoldTask) -> None:
        """Train a fold with the process that runs the trial: `fit` with the same data, and no report."""
        scores = [score for score, _ in task.earlier]
        trial: Any = FollowedTrial(task.n_objectives)
        reports = self._callback(trial, scores, pause_with_others if task.pauses else None)
        reports.restore(task.reports, [Report(*one) for one in task.curve])
        setup = self.build(task.params)
        setup.begin_fold(len(scores), [found for _, found in task.earlier if found is not None])
        callbacks = [
            OOMHandler(),
            *setup.first_callbacks(self.compile, self.encoder, task.steps_left),
            *[*early_stopping(self.monitor), reports, StopOnRequest(self.request, save_with_others)],
            *setup.last_callbacks(),
        ]
        try:
            setup.make_trainer(callbacks=callbacks).fit(
                setup.model, datamodule=setup.datamodule, ckpt_path=task.checkpoint, weights_only=self.weights_only
            )
            reports.close_fold()
        except (optuna.TrialPruned, Stopped):
            pass
        finally:
            release(host=False)

    def _reports(
        self, trial: optuna.Trial, done: list[FoldResult], save: Callable[[Trainer | None], None]
    ) -> FoldPruningCallback:
        """The callback that reports the next fold; `save` is called before a pause from which it can be resumed."""
        study, pruner = trial.study, trial.study.pruner

        def save_paused(trainer: Trainer | None) -> None:
            assert isinstance(pruner, AshaPruner)
            latest = study.get_trials(deepcopy=False)[trial.number]
            if as_the_first_decides(pruner.can_be_resumed(study, latest, self.n_trials)):
                save(trainer)

        pause = save_paused if isinstance(pruner, AshaPruner) else None
        return self._callback(trial, [fold.score for fold in done], pause)

    def _callback(
        self, trial: optuna.Trial, earlier: list[float], pause: Callable[[Trainer | None], None] | None
    ) -> FoldPruningCallback:
        """The callback of the fold after those whose scores these are."""
        return FoldPruningCallback(
            trial,
            self.monitor.logged,
            fold=len(earlier),
            folds=self.steps.folds,
            epochs=self.steps.epochs,
            earlier=earlier,
            objective=self.monitor.objective,
            direction=self.monitor.direction,
            per_epoch=self.steps.per_epoch,
            pause=pause,
        )

    def _steps_left(self, later: float, setup: TrialSetup, fold: int) -> int | None:
        """Optimizer steps that this process will still make, if trials are pruned as often as they were so far."""
        epoch = setup.steps_per_epoch
        return None if epoch is None else round(epoch * self.steps.epochs * (self.steps.folds - fold + later))

    def _later_folds(self, study: optuna.Study) -> float:
        """How many folds this process will train after this trial."""
        trials = study.get_trials(deepcopy=False)
        ended = [trial for trial in trials if trial.state in ENDED]
        reports = sum(len(trial.intermediate_values) for trial in ended)
        share = reports / (len(ended) * self.steps.total) if reports else 1.0
        workers = sum(trial.state == TrialState.RUNNING for trial in trials)
        return max(self.n_trials - len(ended) - 1, 0) * self.steps.folds * share / max(workers, 1)


def _check_running(trial: optuna.Trial) -> None:
    """Raise `UpdateFinishedTrialError` where another process has ended the trial, and may have written its files."""
    if trial.study.get_trials(deepcopy=False)[trial.number].state.is_finished():
        raise UpdateFinishedTrialError(f"trial {trial.number} was ended by another process")
