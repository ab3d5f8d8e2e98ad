"""The search: the only room that knows Optuna."""

from lightning_bge.hpo.check import Forecast, describe_pruner, forecast
from lightning_bge.hpo.eta import Eta, estimate_end
from lightning_bge.hpo.history import History, PastTrial, read_history, time_left
from lightning_bge.hpo.hours import Savings, SearchClock, best_over_hours, hours_saved
from lightning_bge.hpo.importance import parameter_importance
from lightning_bge.hpo.objective import BEST, INTERRUPTED, Objective, Setup, early_stopping
from lightning_bge.hpo.points import complete_point, draw_points, ends, parse_points, points_to_check
from lightning_bge.hpo.promote import PromotePruner
from lightning_bge.hpo.pruners import BootstrapPruner, FoldEndPruner, FoldWilcoxonPruner, ReachPruner, WarmupPruner
from lightning_bge.hpo.pruning import PrunerConfig, build_pruner
from lightning_bge.hpo.repeats import run_repeats
from lightning_bge.hpo.replay import Recording, record_study
from lightning_bge.hpo.reports import FoldPruningCallback, Steps
from lightning_bge.hpo.results import describe_study, finish_study
from lightning_bge.hpo.space import Space, parse_space
from lightning_bge.hpo.study import (
    MemoryKeptError,
    StudyConfig,
    differences,
    open_study,
    others_go_on,
    quiet_optuna,
    run_study,
)
from lightning_bge.hpo.watch import Watched, watch_objective, would_prune

__all__ = [
    "BEST",
    "INTERRUPTED",
    "BootstrapPruner",
    "Eta",
    "FoldEndPruner",
    "FoldPruningCallback",
    "FoldWilcoxonPruner",
    "Forecast",
    "History",
    "MemoryKeptError",
    "Objective",
    "PastTrial",
    "PromotePruner",
    "PrunerConfig",
    "ReachPruner",
    "Recording",
    "Savings",
    "SearchClock",
    "Setup",
    "Space",
    "Steps",
    "StudyConfig",
    "WarmupPruner",
    "Watched",
    "best_over_hours",
    "build_pruner",
    "complete_point",
    "describe_pruner",
    "describe_study",
    "differences",
    "draw_points",
    "early_stopping",
    "ends",
    "estimate_end",
    "finish_study",
    "forecast",
    "hours_saved",
    "open_study",
    "others_go_on",
    "parameter_importance",
    "parse_points",
    "parse_space",
    "points_to_check",
    "quiet_optuna",
    "read_history",
    "record_study",
    "run_repeats",
    "run_study",
    "time_left",
    "watch_objective",
    "would_prune",
]
