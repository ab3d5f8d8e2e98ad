"""Which metric a run monitors, and which epoch's value is its score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_bge.errors import ConfigError
from lightning_bge.types import Task

# Each task's metrics; the first is monitored by default.
METRICS: dict[str, tuple[str, ...]] = {
    "binary": ("f1", "accuracy", "precision", "recall", "auroc", "average_precision", "map", "mrr", "loss"),
    "multiclass": ("f1", "accuracy", "precision", "recall", "auroc", "average_precision", "loss"),
    "multilabel": ("f1", "accuracy", "precision", "recall", "auroc", "average_precision", "loss"),
    "regression": ("spearman", "pearson", "mse", "mae", "r2", "loss"),
}
LOWER_IS_BETTER = ("loss", "mse", "mae")
DECISION_METRICS = ("f1", "accuracy", "precision", "recall")  # what the threshold of a yes/no decision changes
HAS_THRESHOLD = ("binary", "multilabel")  # tasks


@dataclass(frozen=True)
class MonitorConfig:
    """The metric of a run, and which epoch's value is its score.

    Attributes:
        metric: metric for early stopping, checkpoints and the study; null: f1, or spearman for a regression.
        objective: the score of a run is the value of its `best` or of its `last` epoch.
        patience: stop after this many epochs without a better value; null: never stop early.
        threshold: where f1, accuracy, precision or recall of yes/no decisions (binary, multi-label) are compared:
            `tuned` takes the threshold that is best on the folds before, and in a first or only fold the one that is
            best on other parts of its rows, as the exported model has a tuned threshold too; `fixed` takes 0.5, which
            also ranks how well scores are calibrated.
    """

    metric: str | None = None
    objective: Literal["best", "last"] = "best"
    patience: int | None = None
    threshold: Literal["tuned", "fixed"] = "tuned"

    def __post_init__(self) -> None:
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"monitor.patience: expected 1 or more, or null, got {self.patience}")
        if self.threshold not in ("tuned", "fixed"):
            raise ConfigError(f"monitor.threshold: expected tuned or fixed, got {self.threshold!r}")

    @property
    def tuned(self) -> bool:
        """Whether values are compared at a tuned threshold."""
        return self.threshold == "tuned" and self.metric in DECISION_METRICS

    @property
    def logged(self) -> str:
        """The name under which a module logs the monitored value of a validation."""
        return f"val_{'tuned_' if self.tuned else ''}{self.metric}"


def metric_direction(metric: str) -> Literal["maximize", "minimize"]:
    """`maximize` or `minimize`, as Optuna names them."""
    return "minimize" if metric in LOWER_IS_BETTER else "maximize"


def check_metric(
    task: Task, metric: str | None, threshold: Literal["tuned", "fixed"] = "tuned", grouped: bool = True
) -> tuple[str, Literal["tuned", "fixed"]]:
    """The metric to monitor, and at which threshold.

    Args:
        task: of the model.
        metric: the requested one; None: the task's first.
        threshold: the requested one; `fixed` is returned where the task or the metric has none.
        grouped: whether rows have groups.

    Raises:
        ConfigError: the task has no such metric, or it needs groups where there are none.
    """
    metric = METRICS[task][0] if metric is None else metric
    if metric not in METRICS[task]:
        raise ConfigError(f"monitor.metric: a {task} task has {', '.join(METRICS[task])}; got {metric}")
    if metric in ("map", "mrr") and not grouped:
        raise ConfigError(f"monitor.metric: {metric} ranks the rows of each group; name data.group_column")
    return metric, threshold if task in HAS_THRESHOLD and metric in DECISION_METRICS else "fixed"
