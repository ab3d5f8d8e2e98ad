"""Which metric a run monitors, and which epoch's value is its score."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_bge.errors import ConfigError
from lightning_bge.models.metrics.class_path import class_direction
from lightning_bge.models.metrics.names import (
    DECISION_METRICS,
    HAS_THRESHOLD,
    METRICS,
    has_metric,
    metric_direction,
    metric_name,
)
from lightning_bge.types import Task


@dataclass(frozen=True)
class MonitorConfig:
    """The metric of a run, and which epoch's value is its score.

    Attributes:
        metric: metric for early stopping, checkpoints and the study; null: f1, or spearman for a regression. Any metric
            of torchmetrics by its class: {class_path: torchmetrics.classification.BinaryFBetaScore, init_args: {beta:
            2.0}}, or torchmetrics.MatthewsCorrCoef alone; it is given scores, and decides by its own threshold.
        objective: the score of a run is the value of its `best` or of its `last` epoch.
        patience: stop after this many epochs without a better value; null: never stop early.
        threshold: where metrics of yes/no decisions (binary, multi-label) are compared, such as f1, accuracy or recall:
            `tuned` takes the threshold that is best on the folds before, and in a first or only fold the one that is
            best on other parts of its rows, as the exported model has a tuned threshold too; `fixed` takes 0.5, which
            also ranks how well scores are calibrated. Best is the highest accuracy, f0.5, f2, mcc or kappa where that
            is the metric, else the highest f1.
        min_delta: a value counts as better for `patience` where it is better by more than this.
        mode: max or min, for a class whose `higher_is_better` does not say which; null: what the metric says.
    """

    metric: str | dict[str, Any] | None = None
    objective: Literal["best", "last"] = "best"
    patience: int | None = None
    threshold: Literal["tuned", "fixed"] = "tuned"
    min_delta: float = 0.0
    mode: Literal["max", "min"] | None = None

    def __post_init__(self) -> None:
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"monitor.patience: expected 1 or more, or null, got {self.patience}")
        if self.threshold not in ("tuned", "fixed"):
            raise ConfigError(f"monitor.threshold: expected tuned or fixed, got {self.threshold!r}")
        if not self.min_delta >= 0:
            raise ConfigError(f"monitor.min_delta: expected 0 or more, got {self.min_delta}")
        if self.mode not in ("max", "min", None):
            raise ConfigError(f"monitor.mode: expected max, min or null, got {self.mode!r}")

    @property
    def name(self) -> str:
        """The metric's name in logs, files and messages."""
        return str(self.metric) if self.metric is None else metric_name(self.metric)

    @property
    def of_decisions(self) -> bool:
        """Whether the metric is one of decisions, which a class is not: it is given scores."""
        return isinstance(self.metric, str) and self.metric in DECISION_METRICS

    @property
    def tuned(self) -> bool:
        """Whether values are compared at a tuned threshold."""
        return self.threshold == "tuned" and self.of_decisions

    @property
    def logged(self) -> str:
        """The name under which a module logs the monitored value of a validation."""
        return f"val_{'tuned_' if self.tuned else ''}{self.name}"

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """`maximize` or `minimize`, as Optuna names them."""
        if self.mode is not None:
            return "maximize" if self.mode == "max" else "minimize"
        return metric_direction(self.name)


def check_monitor(monitor: MonitorConfig, task: Task, grouped: bool = True) -> MonitorConfig:
    """The options with what follows from the task: the metric, its threshold, and the `mode` of a class.

    Args:
        monitor: as requested.
        task: of the model.
        grouped: whether rows have groups.

    Raises:
        ConfigError: the task has no such metric, it needs groups where there are none, or the class can't be made.
    """
    metric = METRICS[task][0] if monitor.metric is None else monitor.metric
    if isinstance(metric, str) and not has_metric(task, metric):
        if "." not in metric:
            known = ", ".join(METRICS[task])
            raise ConfigError(
                f"monitor.metric: a {task} task has {known}, or a class such as torchmetrics.AUROC; got {metric}"
            )
        metric = {"class_path": metric}
    if metric in ("map", "mrr") and not grouped:
        raise ConfigError(f"monitor.metric: {metric} ranks the rows of each group; name data.group_column")
    if isinstance(metric, dict):
        return replace(
            monitor, metric=metric, threshold="fixed", mode=class_direction(metric, task, monitor.mode, grouped)
        )
    mode = "max" if metric_direction(metric) == "maximize" else "min"
    if monitor.mode not in (mode, None):
        raise ConfigError(f"monitor.mode: expected null or {mode} with monitor.metric={metric}, got {monitor.mode}")
    has_threshold = task in HAS_THRESHOLD and metric in DECISION_METRICS
    return replace(monitor, metric=metric, threshold=monitor.threshold if has_threshold else "fixed")
