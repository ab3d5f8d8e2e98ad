"""A temporary study that runs the trials of the planned study, shortened, and times each part of them.

The trials are run by the same objective as in the planned study, with a journal, checkpoints of paused trials and the
encoder cache, so that everything that takes time in a trial is measured. Only their epochs are shorter.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bge.advisor.plan.planned_trials import PlannedTrials
from lightning_bge.advisor.report.report import write_report
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.asha_trials import SETTLED_RUNGS
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.space.draw import SamplerConfig
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.study import open_study, study_storage
from lightning_bge.hpo.trial.objective import Objective
from lightning_bge.hpo.trial.setup import TrialSetup
from lightning_bge.hpo.trials import PARAMETER_SET, RESUMES
from lightning_bge.runtime.clock import wait_for

_clock = time.perf_counter


class Step(NamedTuple):
    """One optimizer step, or one batch of a validation.

    Attributes:
        seconds: from the start of the batch to its end, with the device synchronized at both (CUDA).
        wait: seconds from the end of the batch before to the start of this one; 0 for the first batch of an epoch or
            of a validation, whose wait is a part of starting it.
        work: real tokens of the batch, without padding; 1 for a batch of another project.
    """

    seconds: float
    wait: float
    work: int


def seconds_of(steps: Sequence[Step]) -> float:
    """Seconds of these steps, with the waits between them."""
    return math.fsum(step.seconds + step.wait for step in steps)


def work_of(steps: Sequence[Step]) -> int:
    """The work of these steps."""
    return sum(step.work for step in steps)


@dataclass(frozen=True)
class InEffect:
    """Optimizations that were in effect in the measured trials.

    Attributes:
        device: `cpu`, `cuda` ...
        precision: of the trainer.
        attention: `packed` or `padded`; unknown for a module of another project.
        tf32: whether a GPU multiplies fp32 matrices in TF32.
    """

    device: str
    precision: str
    attention: str
    tf32: bool = False


class StepTimer(Callback):
    """Times the batches of training, validation and test; for several calls of `fit`, call `start` before each.

    Args:
        work: what the seconds of a batch are proportional to.

    Attributes:
        began: time of `start`.
        ready: time at which training started, everything being built; None: it did not.
        first: start of the first training batch, or None.
        last: end of the last batch or validation.
        ended: end of `fit`, or of its exception, or None.
        steps: optimizer steps.
        validation: batches of validations and of the test.
        validations: number of validations.
        in_effect: optimizations in effect in the last call of `fit`.
    """

    in_effect: InEffect

    def __init__(self, work: Callable[[Any], int]) -> None:
        self._work = work
        self.start()

    def start(self) -> None:
        """Forget what was measured; `fit` is about to be called."""
        self.began = self.last = self._since = _clock()
        self.ready: float | None = None
        self.first: float | None = None
        self.ended: float | None = None
        self.steps: list[Step] = []
        self.validation: list[Step] = []
        self.validations = 0
        self._waited: float | None = None  # since when the next batch is waited for

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is built."""
        attention = getattr(getattr(pl_module, "net", None), "attention", "unknown")
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"
        self.in_effect = InEffect(pl_module.device.type, str(trainer.precision), str(attention), tf32)
        self.ready = _now(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The wait for the first batch is not counted as one."""
        self._waited = None

    on_validation_start = on_train_epoch_start

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A step begins."""
        self.on_validation_batch_start(trainer, pl_module)
        if self.first is None:
            self.first = self._since

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """A step has ended."""
        self.steps.append(self._step(pl_module, batch))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """A batch of a validation or of the test begins."""
        self._since = _now(pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        """A batch of a validation or of the test has ended."""
        self.validation.append(self._step(pl_module, batch))

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The validation has ended, and its metrics are computed."""
        self.last = _now(pl_module)
        self.validations += 1
        self._waited = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """The call of `fit` or `test` has ended, or the trial was paused or has failed."""
        self.ended = _clock()

    on_exception = teardown

    def _step(self, module: LightningModule, batch: Any) -> Step:
        now = self.last = _now(module)
        wait = 0.0 if self._waited is None else self._since - self._waited
        self._waited = now
        return Step(now - self._since, wait, self._work(batch))


def _now(module: LightningModule) -> float:
    wait_for(module.device)
    return _clock()


MANY = 10**6  # trials of the study, so that each paused one can still be resumed


@dataclass(frozen=True)
class TimedRun:
    """A trial from its start, or from where it was resumed, to its pause or its end, in seconds.

    Attributes:
        wall: all of it.
        load: reading the encoder, or resetting the cached one.
        read: whether it was read.
        build: from the start of the fold to the start of training, without `load`.
        start: from there to the first batch.
        inside: from the first batch to the end of the last validation.
        end: from there to the end of `fit`, with the checkpoint if the trial is paused.
        steps: all optimizer steps.
        validation: all batches of all validations.
        epochs: number of epochs.
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
    def outside(self) -> float:
        """Outside of the fold: asking for parameters, the journal, releasing memory."""
        return self.wall - self.load - self.build - self.start - self.inside - self.end

    @property
    def between(self) -> float:
        """The part of each epoch that is neither a step nor a batch of a validation."""
        return (self.inside - seconds_of(self.steps) - seconds_of(self.validation)) / self.epochs


class ShortStudy:
    """A temporary study of shortened trials.

    Args:
        planned: the trials of the planned study.
        hpo: the planned study.
        folder: of the temporary study; files are written into it.

    Attributes:
        planned: the trials of the planned study.
        refit: whether the planned study refits a model at its end.
        timer: has the steps of the last run.
    """

    def __init__(self, planned: PlannedTrials, hpo: StudyConfig, folder: Path) -> None:
        self.planned, self.refit, self._folder = planned, hpo.refit, folder / "study"
        self._hpo = replace(hpo, files=None)  # nothing of this study is to get among the files of the planned one
        self.timer = StepTimer(planned.work)
        self._steps, self._pauses = 2, hpo.pruner.name == "asha"
        # one epoch before a pause and two after it, so that one epoch follows another
        self._epochs = 3 if self._pauses else 2
        pruner = PrunerConfig("asha", 1000, min_resource=1) if self._pauses else PrunerConfig("none")
        config = StudyConfig(MANY, hpo.space, pruner=pruner, sampler=SamplerConfig("random"), seed_replicates=0)
        monitor = planned.monitor
        options = {"monitor.metric": monitor.name, "monitor.objective": monitor.objective}  # read by the report
        steps = Steps(1, self._epochs)
        place = study_storage(self._folder, config)
        self._study = open_study(place, config, monitor.direction, steps, options)
        compile = planned.compile
        self._objective = Objective(
            build=self.shorten,
            space=parse_space(hpo.space),
            monitor=monitor,
            steps=steps,
            files=planned.files(self._folder),
            n_trials=MANY,
            # auto never compiles here, as its decision depends on the remaining hours
            compile=CompileConfig("never") if compile is None or compile.policy == "auto" else compile,
            encoder=planned.encoder,
            weights_only=hpo.weights_only,
        )

    def shorten_epochs(self, steps: int) -> None:
        """Set the optimizer steps of an epoch; 2 until then."""
        self._steps = steps

    def shorten(self, params: dict[str, Any]) -> TrialSetup:
        """Build a trial with short epochs and few rows to validate; the timer starts."""
        self.timer.start()
        setup = self.planned.build(params)
        limits = self.planned.limits(setup, self._steps, self._epochs)

        def make_trainer(callbacks: Sequence[Callback] = (), **changes: Any) -> Trainer:
            return setup.make_trainer(callbacks=[self.timer, *callbacks], **{**limits, **changes})

        return replace(setup, make_trainer=make_trainer)

    def run(self, params: dict[str, Any]) -> tuple[TimedRun, ...]:
        """Run a trial, with a pause if the planned study pauses trials; empty if it ran out of memory."""
        self._study.enqueue_trial(params)
        runs = [self._run()]
        [trial] = self._study.get_trials(deepcopy=False)[-1:]
        if "oom_where" in trial.user_attrs:
            return ()
        if self._pauses:
            resumption = {RESUMES: trial.number, PARAMETER_SET: trial.number, SETTLED_RUNGS: 1}
            self._study.enqueue_trial(params, user_attrs=resumption)
            runs.append(self._run())
        return tuple(runs)

    def _run(self) -> TimedRun:
        encoder, timer = self.planned.encoder, self.timer
        loads, load_s, since = encoder.loads, encoder.load_seconds, _clock()
        self._study.optimize(self._objective, n_trials=1)
        wall, load_s = _clock() - since, encoder.load_seconds - load_s
        began, ready, first, last, ended = timer.began, timer.ready, timer.first, timer.last, timer.ended
        if ready is None or first is None or ended is None:  # it ran out of memory before the first step
            ready, first, last, ended = began, began, began, began
        return TimedRun(
            wall,
            load_s,
            encoder.loads > loads,
            ready - began - load_s,
            first - ready,
            last - first,
            ended - last,
            tuple(timer.steps),
            tuple(timer.validation),
            timer.validations,
        )

    def finish(self) -> float:
        """End the study as the planned one ends, and return the seconds; the timer has its refit and its test."""
        since = _clock()
        self.planned.finish(self._study, self._folder, self.shorten, self._epochs, self._hpo)
        write_report(self._folder)
        return _clock() - since

    def test_work(self) -> int:
        """Of the test file, after `finish`; 0 if it is not scored."""
        return self.planned.test_work() if self.refit else 0
