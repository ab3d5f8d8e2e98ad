"""Metrics of torchmetrics that YAML names by the path of their class."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric as TorchMetric

from lightning_bge.errors import ConfigError, first_line
from lightning_bge.runtime.class_path import find_class
from lightning_bge.types import Schema, Task

OPTION = "monitor.metric"
EXAMPLE = "{class_path: torchmetrics.classification.BinaryFBetaScore, init_args: {beta: 2.0}}"
TRIED_ROWS = 8  # of each class, on which a metric is tried
UNKNOWN = 100  # classes, before the data are read: enough for a `top_k`


def class_direction(
    metric: Mapping[str, Any], task: Task, mode: Literal["max", "min"] | None, grouped: bool
) -> Literal["max", "min"]:
    """Whether higher values are better, `max`, or lower ones.

    Args:
        metric: `class_path` and `init_args`.
        task: of the model.
        mode: what the user says of it.
        grouped: whether rows have groups.

    Raises:
        ConfigError: the class can't be made, it ranks groups where there are none, it does not say what is better and
            nor does the user, or both do and differ.
    """
    found, path = build_metric(metric, task, UNKNOWN), metric.get("class_path")
    if _ranks_groups(found) and not grouped:
        raise ConfigError(f"{OPTION}: {path} ranks the rows of each group; name data.group_column")
    higher = found.higher_is_better
    if higher is None:
        if mode is None:
            raise ConfigError(
                f"{OPTION}: {path} does not say whether higher values are better: set monitor.mode to max or min"
            )
        return mode
    known: Literal["max", "min"] = "max" if higher else "min"
    if mode not in (known, None):
        raise ConfigError(f"monitor.mode: expected null or {known} with {OPTION}={path}, got {mode}")
    return known


def build_metric(metric: Mapping[str, Any], task: Task, num_labels: int) -> TorchMetric:
    """A new object of the class; the task and its number of classes are passed where the class takes them.

    Args:
        metric: `class_path`, and `init_args` where there are any.
        task: of the model.
        num_labels: classes or labels.

    Raises:
        ConfigError: there is no such class, it is no metric, or it does not accept the arguments.
    """
    unknown = sorted(set(metric) - {"class_path", "init_args"})
    if unknown or "class_path" not in metric:
        raise ConfigError(f"{OPTION}: expected the keys class_path and init_args, got {dict(metric)}. Write {EXAMPLE}")
    path, given = str(metric["class_path"]), metric.get("init_args") or {}
    kind = _find(path)
    if not isinstance(given, Mapping):
        raise ConfigError(f"{OPTION}: expected init_args as names and values, got {given!r}. Write {EXAMPLE}")
    own = {"task": task, "num_classes" if task == "multiclass" else "num_labels": num_labels}
    known = inspect.signature(kind).parameters if task in ("binary", "multiclass", "multilabel") else {}
    with _quiet():
        try:
            return kind(**{name: value for name, value in own.items() if name in known} | dict(given))
        except (TypeError, ValueError, ImportError, ModuleNotFoundError) as error:
            raise ConfigError(
                f"{OPTION}: {path} does not accept init_args {dict(given)}: {first_line(error)}"
            ) from error


def compute_class(
    metric: Mapping[str, Any], schema: Schema, score: Tensor, labels: Tensor, groups: Tensor | None
) -> float:
    """The value of a metric of torchmetrics, computed of scores and labels.

    Args:
        metric: `class_path` and `init_args`.
        schema: of the model.
        score: as `scores` returns it: probabilities, or (regression) values.
        labels: as in `Predictions`; they are whole numbers but for a regression.
        groups: int64 [N], for metrics that rank the rows of each group (`indexes`); or None.

    Raises:
        ConfigError: the metric can't be computed of such scores and labels, or gives something else than one number.
    """
    path, found = metric["class_path"], build_metric(metric, schema.task, len(schema.labels))
    more: dict[str, Any] = {"indexes": groups} if _ranks_groups(found) else {}
    try:
        with _quiet():
            value = found(score, labels if schema.task == "regression" else labels.long(), **more)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError, UserWarning) as error:
        raise ConfigError(
            f"{OPTION}: {path} can't be computed of the scores {list(score.shape)} and labels {list(labels.shape)} "
            f"of a {schema.task} task: {first_line(error)}"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"{value.numel()} numbers" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ConfigError(f"{OPTION}: expected a metric that gives one number, and {path} gives {what}: set average")
    return float(value)


def try_class(metric: Mapping[str, Any], schema: Schema) -> None:
    """Compute a metric of made-up scores and labels of a task, before anything is trained.

    Args:
        metric: `class_path` and `init_args`.
        schema: of the model.

    Raises:
        ConfigError: as `compute_class`.
    """
    classes = max(2, len(schema.labels))
    rows = torch.arange(TRIED_ROWS * classes)
    score, labels = made_up_scores(schema, len(rows)), rows % classes
    if schema.task == "regression":
        labels = score.flip(0)
    elif schema.task == "multilabel":
        labels = (labels[:, None] == torch.arange(classes)).long()
    with warnings.catch_warnings():  # it then takes numbers for classes
        warnings.filterwarnings("error", "No (positive|negative) samples")
        compute_class(metric, schema, score, labels.float(), rows // classes)


def made_up_scores(schema: Schema, rows: int) -> Tensor:
    """Scores as a model of the task could give them, the same ones for as many rows."""
    generator = torch.Generator().manual_seed(0)
    if schema.task in ("binary", "regression"):
        return torch.rand(rows, generator=generator)
    score = torch.rand(rows, len(schema.labels), generator=generator)
    return score.softmax(dim=-1) if schema.task == "multiclass" else score


def _ranks_groups(metric: TorchMetric) -> bool:
    return "indexes" in inspect.signature(metric.update).parameters


def _find(path: str) -> Any:
    expected = f"{OPTION}: expected the path of a class that inherits from torchmetrics.Metric"
    return find_class(path, TorchMetric, expected)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that a metric keeps all scores until it is computed, which is at once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*will save all .* in buffer.*")
        yield
