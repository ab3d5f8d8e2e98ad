"""The search: the only room that knows Optuna."""

from lightning_bge.hpo.objective import INTERRUPTED, Objective, Setup, early_stopping
from lightning_bge.hpo.pruning import BootstrapPruner, PrunerConfig, build_pruner, describe_pruner
from lightning_bge.hpo.reports import FoldPruningCallback
from lightning_bge.hpo.results import describe_study, finish_study
from lightning_bge.hpo.space import parse_space
from lightning_bge.hpo.study import MemoryKeptError, StudyConfig, differences, open_study, quiet_optuna, run_study

__all__ = [
    "INTERRUPTED",
    "BootstrapPruner",
    "FoldPruningCallback",
    "MemoryKeptError",
    "Objective",
    "PrunerConfig",
    "Setup",
    "StudyConfig",
    "build_pruner",
    "describe_pruner",
    "describe_study",
    "differences",
    "early_stopping",
    "finish_study",
    "open_study",
    "parse_space",
    "quiet_optuna",
    "run_study",
]
