"""The metrics by their names: which task has which, what they are computed of, and what is better."""

import re
from typing import Any, Literal

Metric = str | dict[str, Any]
"""A metric by its name, or the class of one: a dict with `class_path` and `init_args`."""

OF_EACH_VALIDATION = ("f1", "accuracy", "precision", "recall", "auroc", "average_precision")
# Each task's metrics; the first is monitored by default. Those behind `loss` are computed where they are monitored.
METRICS: dict[str, tuple[str, ...]] = {
    "binary": (
        *(*OF_EACH_VALIDATION, "map", "mrr", "loss"),
        *("f0.5", "f2", "mcc", "kappa", "recall_at_precision_90"),
    ),
    "multiclass": (*OF_EACH_VALIDATION, "loss", "f1_micro", "f1_weighted", "f0.5", "f2", "mcc", "kappa"),
    "multilabel": (*OF_EACH_VALIDATION, "loss", "f1_micro", "f1_weighted", "f0.5", "f2"),
    "regression": ("spearman", "pearson", "mse", "mae", "r2", "loss"),
}
LOWER_IS_BETTER = ("loss", "mse", "mae")
USUAL_DECISIONS = ("f1", "accuracy", "precision", "recall")
# what the threshold of a yes/no decision changes
DECISION_METRICS = (*USUAL_DECISIONS, "f0.5", "f2", "mcc", "kappa", "f1_micro", "f1_weighted")
AGREEMENT = ("mcc", "kappa")
BETA = {"f0.5": 0.5, "f1": 1.0, "f2": 2.0}  # weight of the recall in the F-measures that are means over the classes
HAS_THRESHOLD = ("binary", "multilabel")  # tasks


def has_metric(task: str, metric: str) -> bool:
    """Whether a task has a metric of that name; `recall_at_precision_<p>` is one for any p from 1 to 99."""
    return metric in METRICS[task] or (task == "binary" and fixed_precision(metric) is not None)


def fixed_precision(metric: str) -> int | None:
    """The per cent in `recall_at_precision_<p>`; None: another metric."""
    found = re.fullmatch(r"recall_at_precision_([1-9][0-9]?)", metric)
    return None if found is None else int(found[1])


def metric_name(metric: Metric) -> str:
    """The name in logs, files and messages: `binary_fbeta_score` for a class `BinaryFBetaScore`.

    That of a class which would be the name of another metric begins with the package's: `torchmetrics_accuracy`.
    """
    if isinstance(metric, str):
        return metric
    package, _, name = str(metric["class_path"]).rpartition(".")
    words = "_".join(re.findall(r"[A-Z]+[a-z0-9]*|[a-z0-9]+", name)).lower()
    taken = any(has_metric(task, words) for task in METRICS)
    return f"{package.partition('.')[0]}_{words}" if taken else words


def threshold_metric(metric: str) -> str:
    """What a threshold is best for where a metric is monitored: for itself, or for F1, the usual measure.

    A threshold alone can make precision or recall 1. With several labels one threshold serves the mean over them.
    """
    return metric if metric in ("accuracy", *BETA, *AGREEMENT) else "f1"


def metric_direction(metric: str) -> Literal["maximize", "minimize"]:
    """`maximize` or `minimize`, as Optuna names them."""
    return "minimize" if metric in LOWER_IS_BETTER else "maximize"
