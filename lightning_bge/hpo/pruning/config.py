"""From the settings under `hpo.pruner` to a pruner, and at which reports it can stop a trial.

A trial reports at consecutive steps 1..n (folds x epochs x reports an epoch), and is not asked at the last one, where
nothing is left to save. All that is said here about "can prune" rests on that; `hpo.reports` sees to it.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from typing import Literal, get_args

from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, PatientPruner, PercentilePruner

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.pruning.asha import AshaPruner, rung_steps
from lightning_bge.hpo.pruning.pruners import (
    BootstrapPruner,
    FoldEndPruner,
    FoldWilcoxonPruner,
    ReachPruner,
    WarmupPruner,
)
from lightning_bge.hpo.steps import Steps

PrunerName = Literal["promote", "reach", "hyperband", "median", "percentile", "wilcoxon", "disarmed_hyperband", "none"]

_AROUND = {"patience", "reach", "fold_confidence", "bootstrap"}
_OPTIONS: dict[str, set[str]] = {
    "promote": {"reduction_factor", "min_resource", "paused_gb"},
    "reach": {"warmup_reports", *_AROUND},
    "hyperband": {"reduction_factor", "min_resource", *_AROUND},
    "median": {"warmup_reports", *_AROUND},
    "percentile": {"percentile", "warmup_reports", *_AROUND},
    "wilcoxon": {"p_threshold", "patience", "reach", "bootstrap"},
    "disarmed_hyperband": {"reduction_factor", "min_resource", "max_resource", "patience", "bootstrap"},
    "none": set(),
}
ORIGINAL_BOOTSTRAP = 30
REACH = 2


@dataclass(frozen=True)
class PrunerConfig:
    """Which trials are stopped early, and when.

    Attributes:
        name: `promote` (asynchronous successive halving, Li et al. 2020: a trial pauses at each rung, and is resumed
            from its checkpoint when it stands in the top 1/reduction_factor there), `reach` (stops a trial that stands
            lower than any of the best finished ones stood at that report), `hyperband` (Li et al., 2018), `median`,
            `percentile`, `wilcoxon` (Optuna's, by folds), `none`, or `disarmed_hyperband` (PatientPruner around
            Hyperband with Optuna's own bootstrap_count: prunes early arrivals and spares whatever still improves; the
            program says what it will really do). Median and percentile compare a trial's best value over all its
            reports, so an easy first fold shields a bad trial.
        reduction_factor: Promote, Hyperband: of the trials that reach a rung, one in this many goes on. 4 keeps
            brackets few.
        min_resource: Promote, Hyperband: the report at which trials are judged first, in Hyperband's hardest bracket.
            Default: the first one for Hyperband; for promote the first epoch's last, as values within it say little.
        max_resource: Disarmed Hyperband: Optuna's max_resource, which only sets the number of brackets. Default: all
            reports.
        percentile: Percentile: the share of trials, 0 to 100, counted from the best, that goes on.
        p_threshold: Wilcoxon: stop a trial that is worse than the best one at this level. After n folds the smallest
            possible p is 2**-n, so that 0.1 can act after the fourth fold first.
        warmup_reports: Median, percentile, reach: the first so many reports of each fold never prune. Default: those
            of one epoch, as trials that learn nothing may stand above the later winners there; less where nothing
            would be left.
        patience: Prune only a trial that has not improved over this many more reports. Around Hyperband it disarms
            the pruner; this is allowed, and said before the first trial.
        reach: Prune only a trial that stands lower than any of so many best finished trials stood at that report:
            patience across trials. The pruner `reach` is this alone, with 2 by default.
        fold_confidence: Stop a trial between folds, too, when it is this sure (one-sided, above 0.5) that further folds
            will not lift its mean to the best trial's, from the spread of paired differences between folds. null: the
            pruner alone decides.
        bootstrap: The first so many finished trials of the study run to their end. Default: 10 % of the trials, 30 at
            most, since a longer warm-up eats the gain of a small study. Promote needs none, as it ends nothing for
            good. Disarmed Hyperband: Optuna's bootstrap_count, 30 by default.
        paused_gb: Promote: room on the disk for paused trials, in units of 2**30 bytes: weights, gradients' moments and
            predictions of each that may still be resumed. Beyond it those that stand lowest lose theirs, and are
            trained from their start if they are resumed all the same. Default: a quarter of what is free.

    Raises:
        ConfigError: A value is out of range, or was set for a pruner that does not use it.
    """

    name: PrunerName = "promote"
    reduction_factor: int = 4
    min_resource: int | None = None
    max_resource: int | None = None
    percentile: float = 50.0
    p_threshold: float = 0.1
    warmup_reports: int | None = None
    patience: int | None = None
    reach: int | None = None
    fold_confidence: float | None = 0.9
    bootstrap: int | None = None
    paused_gb: float | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(PrunerName):
            raise ConfigError(f"hpo.pruner.name: expected one of {', '.join(get_args(PrunerName))}, got {self.name!r}.")
        for field in fields(self):
            used = field.name == "name" or field.name in _OPTIONS[self.name]
            if not used and getattr(self, field.name) != field.default:
                known = ", ".join(sorted(_OPTIONS[self.name])) or "no options"
                raise ConfigError(
                    f"hpo.pruner.{field.name}: not used by {self.name!r}, which takes {known}; remove it."
                )
        least = {"reduction_factor": 2, "min_resource": 1, "max_resource": 1, "reach": 1}
        least |= {"warmup_reports": 0, "patience": 0, "bootstrap": 0, "paused_gb": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ConfigError(f"hpo.pruner.{name}: expected at least {bound}, got {value}.")
        if self.paused_gb is not None and not math.isfinite(self.paused_gb):
            raise ConfigError(f"hpo.pruner.paused_gb: expected a number, or null, got {self.paused_gb}.")
        for name, low, high in (("percentile", 0, 100), ("p_threshold", 0, 1), ("fold_confidence", 0.5, 1)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"hpo.pruner.{name}: expected {low} to {high}, got {value}.")
        if self.fold_confidence in (0.5, 1):
            raise ConfigError(f"hpo.pruner.fold_confidence: expected between 0.5 and 1, got {self.fold_confidence}.")
        if self.name == "disarmed_hyperband" and self.patience is None:
            raise ConfigError("hpo.pruner.patience: 'disarmed_hyperband' is PatientPruner around Hyperband: set it.")


def bootstrap_trials(config: PrunerConfig, n_trials: int) -> int:
    """Return how many finished trials run to their end: as configured, or min(30, 10 % of the trials)."""
    if config.name in ("promote", "none", "disarmed_hyperband"):
        return 0
    return min(30, n_trials // 10) if config.bootstrap is None else config.bootstrap


def optuna_bootstrap(config: PrunerConfig) -> int:
    """Return Optuna's `bootstrap_count`, for the one pruner that has it."""
    return ORIGINAL_BOOTSTRAP if config.bootstrap is None else config.bootstrap


def judges_between_folds(config: PrunerConfig) -> bool:
    """Return whether a trial can be stopped between folds, besides what the pruner says."""
    return config.fold_confidence is not None and "fold_confidence" in _OPTIONS[config.name]


def warmup_reports(config: PrunerConfig, steps: Steps) -> int:
    """Return how many reports of each fold never prune: as configured, or those of one epoch."""
    if config.warmup_reports is not None:
        return config.warmup_reports
    # the last fold's last report never prunes: with a single split one more must be left
    return max(0, min(steps.per_epoch, steps.per_fold - (2 if steps.folds == 1 else 1)))


def first_report(config: PrunerConfig, steps: Steps) -> int:
    """Return the report of the first rung: as configured, or the first one, or for promote the first epoch's last."""
    if config.min_resource is not None:
        return config.min_resource
    return max(1, min(steps.per_epoch, steps.total - 1)) if config.name == "promote" else 1


def rungs(config: PrunerConfig, steps: Steps) -> list[list[int]]:
    """Return, for each bracket, the reports before the last one at which a trial can be stopped (promote: paused).

    Only Hyperband has several brackets; one whose first rung is the last report is empty: it never prunes.
    """
    last = steps.total
    if config.name == "none":
        return []
    if config.name == "promote":
        return [list(rung_steps(last, first_report(config, steps), config.reduction_factor))]
    least = 1 if config.patience is None else config.patience + 2  # Optuna's PatientPruner is silent before
    if "hyperband" in config.name:
        brackets = _hyperband(config, steps, least)
    elif config.name == "wilcoxon":
        able = [k for k in range(2, steps.folds) if 0.5**k < config.p_threshold]
        brackets = [[k * steps.per_fold for k in able if k * steps.per_fold >= least]]
    else:
        warmup = warmup_reports(config, steps)
        brackets = [[step for step in range(least, last) if (step - 1) % steps.per_fold >= warmup]]
    if judges_between_folds(config):
        ends = range(steps.per_fold, last, steps.per_fold)
        brackets = [sorted({*bracket, *ends}) for bracket in brackets]
    return brackets


def _hyperband(config: PrunerConfig, steps: Steps, least: int) -> list[list[int]]:
    most, least_resource = config.max_resource or steps.total, first_report(config, steps)
    # Optuna's formula with its rounding: log(243, 3) is just below 5, and Optuna then has five brackets, not six
    count = max(0, math.floor(math.log(most / least_resource, config.reduction_factor)) + 1)
    first = [least_resource * config.reduction_factor**bracket for bracket in range(count)]
    if config.patience is not None:  # a rung is settled whenever patience lets the question through
        return [list(range(max(least, step), steps.total)) for step in first]
    return [list(rung_steps(steps.total, step, config.reduction_factor)) for step in first]


def check_pruner(config: PrunerConfig, n_trials: int, steps: Steps) -> None:
    """Raise ConfigError when the pruner could never prune."""
    if n_trials < 1:
        raise ConfigError(f"hpo.pruner: expected at least 1 trial, got {n_trials}.")
    if config.name == "none":
        return
    never = f"hpo.pruner: {config.name!r} could never prune with {n_trials} trials of {steps.total} reports"
    otherwise = "or set hpo.pruner.name to 'none'"
    if not any(rungs(config, steps)):
        raise ConfigError(
            f"{never}: none of its decisions falls before the last report, where nothing is left to save. "
            f"Use more epochs or folds, lower {_blamed(config)}, {otherwise}."
        )
    count = bootstrap_trials(config, n_trials)
    if count >= n_trials:
        raise ConfigError(
            f"{never}: the first {count} finished trials run to their end. Lower hpo.pruner.bootstrap, "
            f"use more trials, {otherwise}."
        )


def _blamed(config: PrunerConfig) -> str:
    if config.name == "wilcoxon":
        return "hpo.pruner.patience or raise hpo.pruner.p_threshold: after n folds p is 2**-n at best"
    field = "min_resource" if config.name in ("promote", "hyperband", "disarmed_hyperband") else "warmup_reports"
    return f"hpo.pruner.{field}" + (" or hpo.pruner.patience" if config.name != "promote" else "")


def build_pruner(config: PrunerConfig, n_trials: int, steps: Steps) -> BasePruner:
    """Build the pruner for a study.

    Args:
        config: What to build.
        n_trials: Trials planned for the study; the default warm-up is a share of them.
        steps: What a trial that runs to its end reports.

    Raises:
        ConfigError: The pruner could never prune; says why and what to change.
    """
    check_pruner(config, n_trials, steps)
    if config.name == "none":
        return NopPruner()
    if config.name == "promote":
        return AshaPruner(rungs(config, steps)[0], config.reduction_factor)
    inner = _base(config, steps)
    if config.patience is not None:
        inner = _patient(inner, config.patience)
    if config.name == "disarmed_hyperband":
        return inner
    if config.reach is not None and config.name != "reach":
        inner = ReachPruner(inner, config.reach)
    if judges_between_folds(config) and steps.folds > 1:
        assert config.fold_confidence is not None
        inner = FoldEndPruner(inner, steps.per_fold, steps.folds, config.fold_confidence)
    return BootstrapPruner(inner, bootstrap_trials(config, n_trials))


def _base(config: PrunerConfig, steps: Steps) -> BasePruner:
    if config.name == "hyperband":
        # an int: with 'auto' each worker would fix its own maximum from the trials that it happens to see
        return HyperbandPruner(first_report(config, steps), steps.total, config.reduction_factor)
    if config.name == "disarmed_hyperband":
        first, most, count = first_report(config, steps), config.max_resource or steps.total, optuna_bootstrap(config)
        return HyperbandPruner(first, most, config.reduction_factor, bootstrap_count=count)
    if config.name == "wilcoxon":
        return FoldWilcoxonPruner(steps.per_fold, config.p_threshold)
    found: BasePruner
    if config.name == "reach":
        found = ReachPruner(best=REACH if config.reach is None else config.reach)
    elif config.name == "median":  # the warm-ups over trials and reports are BootstrapPruner's and WarmupPruner's alone
        found = MedianPruner(n_startup_trials=0)
    else:
        found = PercentilePruner(config.percentile, n_startup_trials=0)
    return WarmupPruner(found, steps.per_fold, warmup_reports(config, steps))


def _patient(inner: BasePruner, patience: int) -> BasePruner:
    with warnings.catch_warnings():  # experimental since 2.8 in name; the tests pin what is used of it
        warnings.simplefilter("ignore", ExperimentalWarning)
        return PatientPruner(inner, patience)
