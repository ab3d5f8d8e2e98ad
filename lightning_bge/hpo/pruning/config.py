"""From the options under `hpo.pruner` to a pruner, and the steps at which it can stop a trial.

A trial reports at the consecutive steps 1..n (folds x epochs x reports of an epoch), and the pruner is not asked at the
last one, where nothing is left to save. The steps at which a pruner can stop a trial, as this module lists them, rest
on that; `FoldPruningCallback` reports so.
"""

import math
import warnings
from dataclasses import dataclass, field, fields
from typing import Any

from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, PatientPruner, PercentilePruner

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.class_path import build_from_path
from lightning_bge.hpo.pruning.asha import AshaPruner
from lightning_bge.hpo.pruning.halving import rung_steps
from lightning_bge.hpo.pruning.pruners import FoldEndPruner, FoldWilcoxonPruner, StartupTrialsPruner, WarmupPruner
from lightning_bge.hpo.steps import Steps

_WRAPPERS = {"patience", "n_startup_trials"}
_OPTIONS: dict[str, set[str]] = {
    "asha": {"reduction_factor", "min_resource", "paused_gb"},
    "hyperband": {"reduction_factor", "min_resource", "fold_confidence", *_WRAPPERS},
    "median": {"n_warmup_steps", "fold_confidence", *_WRAPPERS},
    "percentile": {"percentile", "n_warmup_steps", "fold_confidence", *_WRAPPERS},
    "wilcoxon": {"p_threshold", *_WRAPPERS},
    "none": set(),
}
_OF_CLASSES = {"init_args", *_WRAPPERS}
# each option with a lower limit, and that limit
_AT_LEAST = {"reduction_factor": 2, "min_resource": 1, "n_warmup_steps": 0, "patience": 0, "n_startup_trials": 0}
_AT_LEAST |= {"paused_gb": 0}


# 11 fields: each is an option that users type as --hpo.pruner.NAME.
@dataclass(frozen=True)
class PrunerConfig:
    """Which trials are stopped early, and when.

    Attributes:
        name: `asha` (asynchronous successive halving, Li et al. 2020: a trial pauses at each rung, and is resumed from
            its checkpoint when it is in the top 1/reduction_factor there), `hyperband` (Li et al., 2018), `median`,
            `percentile`, `wilcoxon` (Optuna's, by folds), `none`, or the path of a pruner's class, such as
            `optuna.pruners.ThresholdPruner`. Median and percentile compare a trial's best value
            over all its steps, so that an easy first fold shields a bad trial.
        reduction_factor: for asha and hyperband: of the trials that reach a rung, one in this many trains on. 4 keeps
            brackets few.
        min_resource: for asha and hyperband: the step of the first rung, in Hyperband's hardest bracket. Default: step
            1 for hyperband; for asha the last step of the first epoch, as values within it say little.
        percentile: for percentile: the share of trials, 0 to 100, counted from the best, that trains on.
        p_threshold: for wilcoxon: stop a trial that is worse than the best one at this level. After n folds the
            smallest possible p is 2**-n, so that 0.1 can act after the fourth fold first.
        n_warmup_steps: for median and percentile: nothing is pruned in the first so many steps of each fold. Default:
            the steps of one epoch, as trials that learn nothing may have higher values than the later winners there;
            fewer where no step would be left.
        patience: prune only a trial that has not improved over this many further steps (Optuna's PatientPruner, around
            the pruner). Around hyperband a trial that still improves is then never pruned, however bad it is; the
            lines that are printed before the first trial say so.
        fold_confidence: for hyperband, median and percentile: stop a trial between folds, too, when the probability
            (one-sided, above 0.5) that further folds will not lift its mean to the best trial's is this high, from the
            spread of paired differences between folds. null: the pruner alone decides.
        n_startup_trials: nothing is pruned until so many trials have run to their end. Default: 10 % of the trials, 30
            at most, since a longer start-up uses up what pruning saves in a small study. Asha needs none, as it ends no
            trial for good.
        paused_gb: for asha: disk space for the checkpoints of paused trials (weights, the optimizer's state and
            predictions of each that may still be resumed), in units of 2**30 bytes. Beyond it the lowest of the ranking
            lose theirs, and are trained from their start if they are resumed. Default: a quarter of what is free;
            no limit where hpo.files is a URL.
        init_args: of a pruner that is given by the path of its class.

    Raises:
        ConfigError: a value is out of range, or an option was set for a pruner that does not use it.
    """

    name: str = "asha"
    reduction_factor: int = 4
    min_resource: int | None = None
    percentile: float = 50.0
    p_threshold: float = 0.1
    n_warmup_steps: int | None = None
    patience: int | None = None
    fold_confidence: float | None = 0.9
    n_startup_trials: int | None = None
    paused_gb: float | None = None
    init_args: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if is_class(self):
            _of_class(self)
        used = _OPTIONS.get(self.name, _OF_CLASSES)
        for one in fields(self):
            default = {} if one.name == "init_args" else one.default
            if one.name not in {"name", *used} and getattr(self, one.name) != default:
                known = ", ".join(sorted(used)) or "no options"
                raise ConfigError(f"hpo.pruner.{one.name}: not used by {self.name!r}, which takes {known}; remove it.")
        for name, bound in _AT_LEAST.items():
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


def is_class(config: PrunerConfig) -> bool:
    """Whether the pruner is given by the path of its class."""
    return config.name not in _OPTIONS


def _of_class(config: PrunerConfig) -> BasePruner:
    pruner: BasePruner = build_from_path(
        "hpo.pruner", config.name, BasePruner, config.init_args, names=", ".join(_OPTIONS)
    )
    return pruner


def startup_trials(config: PrunerConfig, n_trials: int) -> int:
    """Return how many trials have to run to their end before any is pruned: n_startup_trials, or min(30, 10 %)."""
    if config.name in ("asha", "none") or (is_class(config) and config.n_startup_trials is None):
        return 0
    return min(30, n_trials // 10) if config.n_startup_trials is None else config.n_startup_trials


def judges_between_folds(config: PrunerConfig) -> bool:
    """Return whether a trial can be stopped between folds, besides what the pruner decides."""
    return config.fold_confidence is not None and "fold_confidence" in _OPTIONS.get(config.name, ())


def warmup_steps(config: PrunerConfig, steps: Steps) -> int:
    """Return in how many first steps of each fold nothing is pruned: n_warmup_steps, or the steps of one epoch."""
    if config.n_warmup_steps is not None:
        return config.n_warmup_steps
    # at the last fold's last step nothing is pruned: with a single split one more step must be left
    return max(0, min(steps.per_epoch, steps.per_fold - (2 if steps.folds == 1 else 1)))


def first_rung(config: PrunerConfig, steps: Steps) -> int:
    """Return the step of the first rung: min_resource, or step 1, or for asha the last step of the first epoch."""
    if config.min_resource is not None:
        return config.min_resource
    return max(1, min(steps.per_epoch, steps.total - 1)) if config.name == "asha" else 1


def rungs(config: PrunerConfig, steps: Steps) -> list[list[int]]:
    """Return, for each bracket, the steps before the last one at which a trial can be stopped (asha: paused).

    Only Hyperband has several brackets; one whose first rung is the last step is empty: it never prunes.
    """
    last = steps.total
    if config.name == "none":
        return []
    if config.name == "asha":
        return [list(rung_steps(last, first_rung(config, steps), config.reduction_factor))]
    least = 1 if config.patience is None else config.patience + 2  # Optuna's PatientPruner prunes nothing before
    if config.name == "hyperband":
        brackets = _hyperband(config, steps, least)
    elif is_class(config):
        brackets = [list(range(least, last))]
    elif config.name == "wilcoxon":
        able = [k for k in range(2, steps.folds) if 0.5**k < config.p_threshold]
        brackets = [[k * steps.per_fold for k in able if k * steps.per_fold >= least]]
    else:
        warmup = warmup_steps(config, steps)
        brackets = [[step for step in range(least, last) if (step - 1) % steps.per_fold >= warmup]]
    if judges_between_folds(config):
        ends = range(steps.per_fold, last, steps.per_fold)
        brackets = [sorted({*bracket, *ends}) for bracket in brackets]
    return brackets


def _hyperband(config: PrunerConfig, steps: Steps, least: int) -> list[list[int]]:
    resource = first_rung(config, steps)
    # Optuna's formula with its rounding: log(243, 3) is just below 5, and Optuna then has five brackets, not six
    count = max(0, math.floor(math.log(steps.total / resource, config.reduction_factor)) + 1)
    first = [resource * config.reduction_factor**bracket for bracket in range(count)]
    if config.patience is not None:  # PatientPruner asks Hyperband at any step, which then settles the rungs passed
        return [list(range(max(least, step), steps.total)) for step in first]
    return [list(rung_steps(steps.total, step, config.reduction_factor)) for step in first]


def check_pruner(config: PrunerConfig, n_trials: int, steps: Steps) -> None:
    """Raise ConfigError when the pruner could never prune."""
    if n_trials < 1:
        raise ConfigError(f"hpo.pruner: expected at least 1 trial, got {n_trials}.")
    if config.name == "none":
        return
    never = f"hpo.pruner: {config.name!r} could never prune with {n_trials} trials of {steps.total} steps"
    otherwise = "or set hpo.pruner.name to 'none'"
    if not any(rungs(config, steps)):
        raise ConfigError(
            f"{never}: none of its decisions falls before the last step, where nothing is left to save. "
            f"Use more epochs or folds, lower {_option_to_lower(config)}, {otherwise}."
        )
    count = startup_trials(config, n_trials)
    if count >= n_trials:
        raise ConfigError(
            f"{never}: nothing is pruned until {count} trials have run to their end. Lower "
            f"hpo.pruner.n_startup_trials, use more trials, {otherwise}."
        )


def _option_to_lower(config: PrunerConfig) -> str:
    if config.name == "wilcoxon":
        return "hpo.pruner.patience or raise hpo.pruner.p_threshold: after n folds p is 2**-n at best"
    field = "min_resource" if config.name in ("asha", "hyperband") else "n_warmup_steps"
    return f"hpo.pruner.{field}" + (" or hpo.pruner.patience" if config.name != "asha" else "")


def build_pruner(config: PrunerConfig, n_trials: int, steps: Steps) -> BasePruner:
    """Build the pruner for a study.

    Args:
        config: the pruner's options.
        n_trials: trials planned for the study; the default of n_startup_trials is a share of them.
        steps: the steps of a trial that runs to its end.

    Raises:
        ConfigError: the pruner could never prune; the message has the reason and what to change.
    """
    check_pruner(config, n_trials, steps)
    if config.name == "none":
        return NopPruner()
    if config.name == "asha":
        return AshaPruner(rungs(config, steps)[0], config.reduction_factor)
    pruner = _inner_pruner(config, steps)
    if config.patience is not None:
        with warnings.catch_warnings():  # Optuna calls it experimental; the tests cover what is used here
            warnings.simplefilter("ignore", ExperimentalWarning)
            pruner = PatientPruner(pruner, config.patience)
    if judges_between_folds(config) and steps.folds > 1:
        assert config.fold_confidence is not None
        pruner = FoldEndPruner(pruner, steps.per_fold, steps.folds, config.fold_confidence)
    return StartupTrialsPruner(pruner, startup_trials(config, n_trials))


def _inner_pruner(config: PrunerConfig, steps: Steps) -> BasePruner:
    if config.name == "hyperband":
        # an int: with 'auto' each worker would fix its own maximum from the trials that it happens to see
        return HyperbandPruner(first_rung(config, steps), steps.total, config.reduction_factor)
    if is_class(config):
        return _of_class(config)
    if config.name == "wilcoxon":
        return FoldWilcoxonPruner(steps.per_fold, config.p_threshold)
    # StartupTrialsPruner and WarmupPruner alone decide where nothing is pruned
    if config.name == "median":
        pruner: BasePruner = MedianPruner(n_startup_trials=0)
    else:
        pruner = PercentilePruner(config.percentile, n_startup_trials=0)
    return WarmupPruner(pruner, steps.per_fold, warmup_steps(config, steps))
