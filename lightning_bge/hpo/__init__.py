"""The search: the only room that knows Optuna."""

from lightning_bge.hpo.check import Forecast, describe_pruner, forecast
from lightning_bge.hpo.objective import BEST, INTERRUPTED, Objective, Setup, early_stopping
from lightning_bge.hpo.points import complete_point, ends, parse_points, points_to_check
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

__all__ = [
    "BEST",
    "INTERRUPTED",
    "BootstrapPruner",
    "FoldEndPruner",
    "FoldPruningCallback",
    "FoldWilcoxonPruner",
    "Forecast",
    "MemoryKeptError",
    "Objective",
    "PromotePruner",
    "PrunerConfig",
    "ReachPruner",
    "Recording",
    "Setup",
    "Space",
    "Steps",
    "StudyConfig",
    "WarmupPruner",
    "build_pruner",
    "complete_point",
    "describe_pruner",
    "describe_study",
    "differences",
    "early_stopping",
    "ends",
    "finish_study",
    "forecast",
    "open_study",
    "others_go_on",
    "parse_points",
    "parse_space",
    "points_to_check",
    "quiet_optuna",
    "record_study",
    "run_repeats",
    "run_study",
]
