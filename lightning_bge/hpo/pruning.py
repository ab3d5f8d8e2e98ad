"""Pruners: Hyperband, median or percentile, behind a warm-up that lets the first trials run to their end.

A trial reports at consecutive steps 1..n_reports (folds x epochs), and is not asked at the last one, where nothing is
left to save. All that is said here about "can prune" rests on that; `hpo.reports` sees to it.
"""

import logging
import math
import warnings
from dataclasses import dataclass, fields
from typing import Literal, get_args

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, PatientPruner, PercentilePruner
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.errors import ConfigError

_log = logging.getLogger(__name__)

PrunerName = Literal["hyperband", "median", "percentile", "none"]

_OPTIONS: dict[str, set[str]] = {
    "hyperband": {"reduction_factor", "min_resource", "patience", "bootstrap"},
    "median": {"warmup_reports", "patience", "bootstrap"},
    "percentile": {"percentile", "warmup_reports", "patience", "bootstrap"},
    "none": set(),
}


@dataclass(frozen=True)
class PrunerConfig:
    """Which trials are stopped early, and when.

    Attributes:
        name: `hyperband` (Li et al., 2018, with the asynchronous halving of Li et al., 2020), `median`,
            `percentile`, or `none`. Median and percentile compare a trial's best value over all its reports, so an
            easy first fold shields a bad trial.
        reduction_factor: Hyperband: of the trials that reach a rung, one in this many goes on. 4 keeps brackets few.
        min_resource: Hyperband: the report at which the hardest bracket judges first.
        percentile: Percentile: the share of trials, 0 to 100, counted from the best, that goes on.
        warmup_reports: Median, percentile: the first so many reports of a trial never prune.
        patience: Prune only a trial that has not improved over this many more reports. Around Hyperband it disarms
            the pruner; this is allowed, and said in the log.
        bootstrap: The first so many finished trials of the study run to their end. Default: 10 % of the trials, 30 at
            most, since a longer warm-up eats the gain of a small study.

    Raises:
        ConfigError: A value is out of range, or was set for a pruner that does not use it.
    """

    name: PrunerName = "hyperband"
    reduction_factor: int = 4
    min_resource: int = 1
    percentile: float = 50.0
    warmup_reports: int = 0
    patience: int | None = None
    bootstrap: int | None = None

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
        for name, least in (("reduction_factor", 2), ("min_resource", 1), ("warmup_reports", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"hpo.pruner.{name}: expected at least {least}, got {getattr(self, name)}.")
        for name in ("patience", "bootstrap"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"hpo.pruner.{name}: expected 0 or more, or null, got {value}.")
        if not 0 <= self.percentile <= 100:
            raise ConfigError(f"hpo.pruner.percentile: expected 0 to 100, got {self.percentile}.")


class BootstrapPruner(BasePruner):
    """Let the first `count` completed trials of a study run to their end, then do as the inner pruner says.

    Optuna's own `bootstrap_count` does the opposite: it prunes the first trials to reach a rung. The inner pruner is
    asked during the warm-up too and its answer ignored, because Hyperband records a trial's value at a rung only when
    asked. A trial that is pruned for another reason (no memory, a metric that is NaN) does not count.

    Args:
        inner: The pruner that decides after the warm-up.
        count: Number of COMPLETE trials before anything is pruned.
    """

    def __init__(self, inner: BasePruner, count: int) -> None:
        self.inner = inner
        self.count = count

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether to stop the trial at its last report."""
        if not self.inner.prune(study, trial):
            return False
        return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) >= self.count


def bootstrap_trials(config: PrunerConfig, n_trials: int) -> int:
    """Return how many finished trials run to their end: as configured, or min(30, 10 % of the trials)."""
    return min(30, n_trials // 10) if config.bootstrap is None else config.bootstrap


def rungs(config: PrunerConfig, n_reports: int) -> list[list[int]]:
    """Return, for each Hyperband bracket, the reports in 1..n_reports-1 at which a trial can be pruned.

    Median and percentile count as one bracket. A bracket whose first rung is the last report is empty: it never prunes.
    """
    if config.name == "none":
        return []
    least = 1 if config.patience is None else config.patience + 2  # Optuna's PatientPruner is silent before
    if config.name != "hyperband":
        return [list(range(max(least, config.warmup_reports + 1), n_reports))]
    first = [config.min_resource * config.reduction_factor**b for b in range(_n_brackets(config, n_reports))]
    if config.patience is not None:  # a rung is settled whenever patience lets the question through
        return [list(range(max(least, step), n_reports)) for step in first]
    return [[step for step in first[b:] if step < n_reports] for b in range(len(first))]


def _n_brackets(config: PrunerConfig, n_reports: int) -> int:
    # Optuna's formula with its rounding: log(243, 3) is just below 5, and Optuna then has five brackets, not six
    return max(0, math.floor(math.log(n_reports / config.min_resource, config.reduction_factor)) + 1)


def _check(config: PrunerConfig, n_trials: int, n_reports: int) -> None:
    """Raise ConfigError when the pruner could never prune."""
    if n_trials < 1 or n_reports < 1:
        raise ConfigError(f"hpo.pruner: expected at least 1 trial and 1 report, got {n_trials} and {n_reports}.")
    if config.name == "none":
        return
    never = f"hpo.pruner: {config.name!r} could never prune with {n_trials} trials of {n_reports} reports"
    otherwise = "or set hpo.pruner.name to 'none'"
    if not any(rungs(config, n_reports)):
        field = "hpo.pruner.min_resource" if config.name == "hyperband" else "hpo.pruner.warmup_reports"
        raise ConfigError(
            f"{never}: none of its decisions falls before the last report, where nothing is left to save. "
            f"Use more epochs or folds, lower {field} or hpo.pruner.patience, {otherwise}."
        )
    count = bootstrap_trials(config, n_trials)
    if count >= n_trials:
        raise ConfigError(
            f"{never}: the first {count} finished trials run to their end. Lower hpo.pruner.bootstrap, "
            f"use more trials, {otherwise}."
        )


def build_pruner(config: PrunerConfig, n_trials: int, n_reports: int) -> BasePruner:
    """Build the pruner for a study.

    Args:
        config: What to build.
        n_trials: Trials planned for the study; the default warm-up is a share of them.
        n_reports: Reports of a trial that runs to its end: folds x epochs. Hyperband's `max_resource`.

    Raises:
        ConfigError: The pruner could never prune; says why and what to change.
    """
    _check(config, n_trials, n_reports)
    inner: BasePruner
    if config.name == "none":
        return NopPruner()
    if config.name == "hyperband":
        # an int: with 'auto' each worker would fix its own maximum from the trials that it happens to see
        inner = HyperbandPruner(config.min_resource, n_reports, config.reduction_factor)
    else:
        # the warm-up over trials is BootstrapPruner's alone; steps count from 1, so `w` silent reports end before w + 1
        warmup = config.warmup_reports + 1
        if config.name == "median":
            inner = MedianPruner(n_startup_trials=0, n_warmup_steps=warmup)
        else:
            inner = PercentilePruner(config.percentile, n_startup_trials=0, n_warmup_steps=warmup)
    if config.patience is not None:
        with warnings.catch_warnings():  # experimental since 2.8 in name; the tests pin what is used of it
            warnings.simplefilter("ignore", ExperimentalWarning)
            inner = PatientPruner(inner, config.patience)
        if config.name == "hyperband":
            _log.warning(
                "hpo.pruner.patience around hyperband disarms it: a trial that still improves is never pruned, however "
                "bad it is, and late values are compared with early ones. Use it with median or percentile."
            )
    return BootstrapPruner(inner, bootstrap_trials(config, n_trials))


def describe_pruner(config: PrunerConfig, n_trials: int, n_reports: int) -> str:
    """Say in one or two lines what will be pruned when, before the study starts.

    Raises:
        ConfigError: As in `build_pruner`.
    """
    _check(config, n_trials, n_reports)
    if config.name == "none":
        return "no pruning: every trial runs to its end"
    steps = rungs(config, n_reports)
    first = min(bracket[0] for bracket in steps if bracket)
    brackets = f"brackets judge at reports {steps}; " if config.name == "hyperband" and config.patience is None else ""
    count = bootstrap_trials(config, n_trials)
    head = f"{config.name}: {brackets}can first prune at report {first} of {n_reports}"
    return head if count == 0 else f"{head}\nthe first {count} of {n_trials} trials to finish run to their end"
