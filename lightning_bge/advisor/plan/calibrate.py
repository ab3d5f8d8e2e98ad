"""Measure what the trials of a study take on this machine, and scale that to their full size.

The seconds of steps and validations are proportional to their tokens, or batches where the data are another project's;
all other parts are independent of the size.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from lightning_bge.advisor.plan.cost_model import (
    Calibration,
    MeasuredTrial,
    ParameterSets,
    TrialCost,
    choose_different,
    features,
)
from lightning_bge.advisor.plan.planned_trials import DataSize
from lightning_bge.advisor.plan.short_study import ShortStudy, Step, TimedRun, seconds_of, work_of
from lightning_bge.errors import ConfigError

MOST_TRIALS = 8
MOST_STEPS = 20  # of a short epoch
# Distinct micro-batches that oneDNN keeps kernels ready for: 1,024 in all, some 15 for each shape of a layer's inputs.
# All trials have the same batches. With fewer than this, only the first trial meets new shapes, and takes longer.
FEW_SHAPES = 64
SHARE = 0.75  # of the time is for the trials; the rest for the end of a study

_clock = time.perf_counter


def calibrate(study: ShortStudy, sets: ParameterSets, seconds: float, folds: int) -> Calibration:
    """Measure some of the parameter sets, and the end of a study.

    Args:
        study: runs the trials.
        sets: parameter sets of the study's trials.
        seconds: about how long to measure; two trials are run even so, unless the first one has taken longer already.
        folds: number of folds of the planned study.

    Raises:
        ConfigError: every trial ran out of memory.
    """
    since = _clock()
    gc.collect()
    gc.freeze()  # as the command does
    try:
        trials, out_of_memory = _time_trials(study, sets, SHARE * seconds, seconds, folds)
    finally:
        gc.unfreeze()
    if not trials:
        raise ConfigError(
            f"hpo.space: all {out_of_memory} parameter sets that were tried ran out of memory. Run `lightning-bge fit` "
            "with one of them for the details"
        )
    runs = [run for trial in trials for run in trial.all_runs]
    cached = [run for run in runs if not run.read]
    reset = fmean(run.load for run in cached) if cached else 0.0
    reads = [run.load for run in runs if run.read]
    return Calibration(
        trials=tuple(trial.scaled(trials, sets, reset) for trial in trials),
        first_trial=_first_trial(trials, reset, sets.epochs),
        end=_end(study, trials),
        refit_epoch=fmean(t.rate for t in trials) * fmean(t.size.all for t in trials) * study.refit,
        read=max(0.0, fmean(reads) - reset) if reads else 0.0,
        steps=fmean(trial.size.steps for trial in trials),
        out_of_memory=out_of_memory,
        took=_clock() - since,
    )


def _time_trials(
    study: ShortStudy, sets: ParameterSets, seconds: float, most: float, folds: int
) -> tuple[list[TimedTrial], int]:
    """Run trial after trial for about so many seconds; also returns how many of them ran out of memory."""
    chosen, since, took, out_of_memory = choose_different(sets, MOST_TRIALS), _clock(), 0.0, 0
    trials: list[TimedTrial] = []
    for params in chosen:
        began = _clock()
        if trials and began - since + took > (seconds if len(trials) > 1 else most):
            break
        if not (runs := study.run(params)):
            out_of_memory, took = out_of_memory + 1, _clock() - began
            continue
        size = study.planned.size(params)
        repeated = study.run(params) if size.steps * sets.epochs * folds <= FEW_SHAPES else ()
        took = _clock() - began
        trials.append(TimedTrial(params, size, runs, repeated, folds))
        if len(trials) == 1:  # the seconds of a step are known from here on
            kinds = len({repr(features(params, sets.space)) for params in chosen})
            study.shorten_epochs(trials[0].short_epoch(took, (seconds - took) / (max(3, kinds) - 1)))
    return trials, out_of_memory


def _first_trial(trials: Sequence[TimedTrial], reset: float, epochs: int) -> float:
    """Excess of the first trial of a process over later ones, with reading each encoder once."""
    first, later = trials[0].first[0], trials[1].runs[0] if len(trials) > 1 else trials[0].runs[-1]
    owner = trials[1] if len(trials) > 1 else trials[0]
    more = first.outside - later.outside + first.build - later.build + trials[0].excess(first) - owner.excess(later)
    reads = sum(run.load - reset for trial in trials for run in trial.all_runs if run.read)
    return max(0.0, more) + max(0.0, reads) + trials[0].new_batches(epochs)


def _end(study: ShortStudy, trials: Sequence[TimedTrial]) -> float:
    """End the study: its seconds without the steps of the refit, and with the whole test file."""
    seconds = study.finish()
    # the first step counts for its excess over the others
    first, *others = study.timer.steps or [Step(0.0, 0.0, 0)]
    seconds -= fmean(trial.rate for trial in trials) * first.work + seconds_of(others)
    seconds -= seconds_of(study.timer.validation)
    return max(0.0, seconds + fmean(trial.validation_rate for trial in trials) * study.test_work())


@dataclass(frozen=True)
class TimedTrial:
    """A shortened trial.

    Attributes:
        params: its hyperparameters.
        size: of its data in the planned study.
        first: its runs: one, or two if it was paused.
        repeated: those of the same trial repeated, whose batches are no longer new to the process; may be empty.
        folds: number of folds in the planned study.
    """

    params: dict[str, Any]
    size: DataSize
    first: tuple[TimedRun, ...]
    repeated: tuple[TimedRun, ...] = ()
    folds: int = 1

    @property
    def all_runs(self) -> tuple[TimedRun, ...]:
        """Those of both."""
        return (*self.first, *self.repeated)

    @property
    def runs(self) -> tuple[TimedRun, ...]:
        """Those that are typical of most trials."""
        return self.repeated or self.first

    @cached_property
    def timed(self) -> list[Step]:
        """The steps that count: all but the first one of each run."""
        return [step for run in self.runs for step in run.steps[1:]]

    @cached_property
    def rate(self) -> float:
        """Seconds of a unit of work in training."""
        return seconds_of(self.timed) / work_of(self.timed)

    @cached_property
    def validation_rate(self) -> float:
        """Seconds of a unit of work in validation."""
        batches = [batch for run in self.runs for batch in run.validation]
        return seconds_of(batches) / work_of(batches)

    @property
    def error(self) -> float:
        """Standard error of `rate`, as a share; 0.1 for a single step."""
        off = [step.seconds + step.wait - self.rate * step.work for step in self.timed]
        return stdev(off) * math.sqrt(len(off)) / seconds_of(self.timed) if len(off) > 1 else 0.1

    def new_batches(self, epochs: int) -> float:
        """Seconds by which a complete trial whose batches are all new to the process takes longer."""
        steps = [step for run in self.first for step in run.steps[1:]] if self.repeated else []
        more = seconds_of(steps) / work_of(steps) - self.rate if steps else 0.0
        return max(0.0, more) * self.size.train * epochs * self.folds

    def excess(self, run: TimedRun) -> float:
        """Excess of a run's first step over the others."""
        return run.steps[0].seconds - self.rate * run.steps[0].work

    def short_epoch(self, took: float, wanted: float) -> int:
        """Number of steps of an epoch with which the next trials take about so many seconds."""
        steps = sum(len(run.steps) for run in self.all_runs)
        epochs = sum(run.epochs for run in self.all_runs)
        each = seconds_of(self.timed) / len(self.timed)
        return max(2, min(MOST_STEPS, steps // epochs + int((wanted - took) / each / epochs)))

    def scaled(self, all: Sequence[TimedTrial], sets: ParameterSets, reset: float) -> MeasuredTrial:
        """The complete trial. For the first one of all, the parts besides steps and validations are the others' mean.

        That leaves out what a process does once.
        """
        others = [trial for trial in all[1:]] if self is all[0] and len(all) > 1 else [self]
        parts = [trial._parts(reset, cold=trial is all[0]) for trial in others]
        cost = TrialCost(
            **{name: fmean(part[name] for part in parts) for name in parts[0]},
            train=self.rate * self.size.train,
            validation=self.validation_rate * self.size.validation,
            epochs=self.params.get("trainer.max_epochs", sets.epochs),
        )
        step_s = cost.train / self.size.steps
        return MeasuredTrial(self.params, features(self.params, sets.space), cost, step_s, self.rate, self.error)

    def _parts(self, reset: float, cold: bool) -> dict[str, float]:
        """Seconds of the parts besides steps and validations.

        Args:
            reset: of the cached encoder.
            cold: the first run is the first one of its process.
        """
        typical = self.runs[1:] if cold and not self.repeated and len(self.runs) > 1 else self.runs
        fresh, last = typical[0], self.runs[-1]
        # the micro-batch size may be searched in the first run; later ones find it in its cache
        fold = (
            fresh.build
            + reset
            + min(run.start for run in typical)
            + fmean(self.excess(run) for run in typical)
            + last.end
        )
        return {
            "start": fmean(run.outside for run in typical),
            "fold": fold,
            "epoch": last.between,
            "pause": self.runs[0].end if len(self.runs) > 1 else 0.0,
            "resume": max(0.0, last.build - fresh.build),
        }
