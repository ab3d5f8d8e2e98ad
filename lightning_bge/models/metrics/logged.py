"""The names under which the module logs what it computes while it trains."""

from lightning_bge.models.metrics.config import MonitorConfig
from lightning_bge.models.metrics.names import HAS_THRESHOLD, METRICS, USUAL_DECISIONS
from lightning_bge.types import Task


def logged_names(task: Task, monitor: MonitorConfig, grouped: bool) -> list[str]:
    """Names that a callback of a training run may monitor.

    Args:
        task: of the model.
        monitor: as `check_monitor` returns it.
        grouped: whether rows have groups.
    """
    usual = METRICS[task][: METRICS[task].index("loss") + 1]
    named = [name for name in usual if grouped or name not in ("map", "mrr")]
    tuned = list(USUAL_DECISIONS) if task in HAS_THRESHOLD else []
    if task in HAS_THRESHOLD and monitor.of_decisions:
        tuned.append(monitor.name)
    validated = dict.fromkeys([*named, monitor.name, *(f"tuned_{name}" for name in tuned)])
    return [*(f"val_{name}" for name in validated), "train_loss", "train_loss_step"]
