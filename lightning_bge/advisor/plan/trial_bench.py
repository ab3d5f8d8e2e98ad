"""A study that is thrown away: a search's own trials, cut short, and each part of them measured.

The trials are run by the search's own objective, with a journal, checkpoints of paused trials and the warm encoder, so
that nothing of what a trial does is left out. Only their epochs are cut short.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bge.advisor.plan.pace import PaceMeter, Step
from lightning_bge.advisor.report.report import write_report
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.asha_trials import resume
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.results import finish_study
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.study import open_study
from lightning_bge.hpo.trial.objective import Build, Objective, TrialFiles, TrialSetup
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.models.metrics import MonitorConfig

VALIDATED = 64  # rows of a short validation, or those of two batches
MANY = 10**6  # trials of the study: each that pauses may still be resumed

_clock = time.perf_counter


@dataclass(frozen=True)
class Sizes:
    """Tokens and steps of the real thing.

    Attributes:
        train: tokens of an epoch, mean over the folds.
        validation: tokens of a validation, likewise.
        all: tokens of all rows.
        steps: optimizer steps of an epoch.
    """

    train: float
    validation: float
    all: float
    steps: int

    @classmethod
    def of(cls, data: TextDataModule) -> Sizes:
        """Of a data module that is set up, over all its folds."""
        lengths = data.lengths("train")
        train, validation = [], []
        for fold in range(data.num_folds):
            data.select_fold(fold)
            train.append(lengths[data.train_rows].sum())
            validation.append(data.lengths("val")[data.val_rows].sum())
        steps = math.ceil(len(data.train_rows) / data.batch_size)
        return cls(float(np.mean(train)), float(np.mean(validation)), float(lengths.sum()), steps)


@dataclass(frozen=True)
class Visit:
    """One stretch of a trial's training, in seconds.

    Attributes:
        wall: all of it.
        load: reading the model, or resetting a warm one.
        read: whether it was read.
        build: from the fold's start to the start of training, without `load`.
        start: from there to the first batch.
        inside: from the first batch to the end of the last validation.
        end: from there to the end of `fit`; of a paused trial, writing its checkpoint.
        steps: all of them.
        validation: all batches of all validations.
        epochs: how many.
    """

    wall: float
    load: float
    read: bool
    build: float
    start: float
    inside: float
    end: float
    steps: tuple[Step, ...]
    validation: tuple[Step, ...]
    epochs: int

    @property
    def outer(self) -> float:
        """Outside of the fold: asking for a point, the journal, giving memory back."""
        return self.wall - self.load - self.build - self.start - self.inside - self.end

    @property
    def between(self) -> float:
        """Of each epoch, what is neither a step nor a batch of a validation."""
        return (self.inside - seconds_of(self.steps) - seconds_of(self.validation)) / self.epochs


def seconds_of(steps: Sequence[Step]) -> float:
    """All of them, with the waits between them."""
    return math.fsum(step.seconds + step.wait for step in steps)


@dataclass(frozen=True)
class Looks:
    """What is in effect in the trials that were measured.

    Attributes:
        device: `cpu`, `cuda` ...
        precision: the trainer's.
        attention: `packed` or `padded`.
        tf32: whether a GPU multiplies fp32 matrices in TF32.
    """

    device: str
    precision: str
    attention: str
    tf32: bool = False


class _Look(Callback):
    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        attention = getattr(pl_module.net, "attention", "unknown")
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"
        self.bench.looks = Looks(pl_module.device.type, str(trainer.precision), str(attention), tf32)


class Bench:
    """A study that is thrown away, whose trials are cut short.

    Args:
        build: the search's.
        hpo: the search.
        objective: of a fold: `best` or `last`.
        compile: when layers are compiled. auto is never here: what it decides depends on the hours to come.
        encoder: loads the models.
        folder: of the study; it is filled.

    Attributes:
        steps: optimizer steps of a short epoch.
        setup: the last one that was built.
        looks: what was in effect in the last trial.
    """

    setup: TrialSetup
    looks: Looks

    def __init__(
        self,
        build: Build,
        hpo: StudyConfig,
        objective: Literal["best", "last"],
        compile: CompileConfig,
        encoder: EncoderCache,
        folder: Path,
    ) -> None:
        self.build, self.encoder, self.folder, self.refit = build, encoder, folder / "bench", hpo.refit
        self.steps, self.meter = 2, PaceMeter(0)
        self.pauses = hpo.pruner.name == "asha"
        # one epoch before a pause, and two after it, so that one follows upon another
        self.epochs = 3 if self.pauses else 2
        pruner = PrunerConfig("asha", 1000, min_resource=1) if self.pauses else PrunerConfig("none")
        config = StudyConfig(MANY, hpo.space, pruner=pruner, sampler="random", seed_replicates=0)
        settings = {"monitor.metric": "loss", "monitor.objective": objective}  # what a report reads
        self.study = open_study(self.folder, config, "minimize", Steps(1, self.epochs), settings)
        encoder.load = self.meter.timed(encoder.load)  # type: ignore[method-assign]
        self.monitor = MonitorConfig("loss", objective)  # never NaN for want of a class among few rows
        self.objective = Objective(
            build=self.short,
            space=parse_space(hpo.space),
            monitor=self.monitor,
            steps=Steps(1, self.epochs),
            files=TrialFiles(self.folder / "oof", self.folder / "paused"),
            n_trials=MANY,
            compile=replace(compile, policy="never") if compile.policy == "auto" else compile,
            encoder=encoder,
        )

    def short(self, params: dict[str, Any]) -> TrialSetup:
        """What `build` makes, with short epochs and few rows to validate; measured from here on."""
        self.meter.begin()
        setup = self.setup = self.build(params)
        data = setup.datamodule
        limits = {"limit_train_batches": self.steps, "limit_test_batches": 1, "max_epochs": self.epochs}
        if data.folds:
            data.limit_validation(max(VALIDATED, 2 * data.batch_size))
        else:
            limits["limit_val_batches"] = 1

        def make_trainer(callbacks: Sequence[Callback] = (), **changes: Any) -> Trainer:
            return setup.make_trainer(callbacks=[self.meter, _Look(self), *callbacks], **{**limits, **changes})

        setup.model.load_encoder_with(
            self.meter.timed(setup.model.load)
        )  # of the refit; trials have the encoder cache's
        return replace(setup, make_trainer=make_trainer)

    def draw(self, params: dict[str, Any]) -> tuple[Visit, ...]:
        """Run a trial with these settings, with one pause where the search's trials pause; none: it does not fit."""
        self.study.enqueue_trial(params)
        visits = [self._visit()]
        [trial] = self.study.get_trials(deepcopy=False)[-1:]
        if "oom_where" in trial.user_attrs:
            return ()
        if self.pauses:
            resume(self.study, trial, [1])
            visits.append(self._visit())
        return tuple(visits)

    def _visit(self) -> Visit:
        loads, meter, since = self.encoder.loads, self.meter, _clock()
        self.study.optimize(self.objective, n_trials=1)
        wall = _clock() - since
        began, ready, first, last, ended = meter.began, meter.ready, meter.first, meter.last, meter.ended
        if ready is None or first is None or ended is None:  # it ran out of memory before the first step
            ready, first, last, ended = began, began, began, began
        return Visit(
            wall,
            meter.build,
            self.encoder.loads > loads,
            ready - began - meter.build,
            first - ready,
            last - first,
            ended - last,
            tuple(meter.steps),
            tuple(meter.validation),
            meter.validations,
        )

    def finish(self) -> float:
        """End the study as a real one ends, and return the seconds; the meter has the refit's steps and the test's."""
        since = _clock()
        finish_study(
            self.study, self.folder, build=self.short, monitor=self.monitor, epochs=self.epochs, refit=self.refit
        )
        write_report(self.folder)
        return _clock() - since

    def test_tokens(self) -> int:
        """Of the test file, after `finish`; 0: there is none, or it is not scored."""
        data = self.setup.datamodule
        return int(data.lengths("test").sum()) if self.refit and data.test_file is not None else 0
