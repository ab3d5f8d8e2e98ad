"""A loss that YAML names by the path of its class."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bge.errors import ConfigError, first_line
from lightning_bge.runtime.class_path import find_class, parameters_of
from lightning_bge.types import Task

OPTION = "model.loss"
EXPECTED = f"{OPTION}.class_path: expected the path of a class that inherits from torch.nn.Module"
NOT_OF_LOGITS: dict[type, str] = {
    nn.BCELoss: "torch.nn.BCEWithLogitsLoss",
    nn.NLLLoss: "torch.nn.CrossEntropyLoss",
    nn.KLDivLoss: "a class of your own that takes logits",
}
"""Losses of torch that take probabilities or their logarithms, and would accept logits without an error."""
FAR = 4.0  # a logit that is clearly on one side; the others are nearer, where losses with a bound have gradients
TRIED_ROWS = 3  # of each class
TRIED_ERRORS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError, UserWarning)


def build_loss(
    path: str, init_args: Mapping[str, Any], task: Task, num_outputs: int, signed_labels: bool, imports: bool = True
) -> nn.Module:
    """A new loss of the class, tried on made-up rows.

    `reduction: none` is passed where the class takes a reduction and none is given; lists become tensors where the
    class takes tensors, such as `weight`.

    Args:
        path: of the class.
        init_args: its arguments.
        task: of the model.
        num_outputs: width of the logits.
        signed_labels: whether it gets labels -1 and 1.
        imports: see `find_class`.

    Raises:
        ConfigError: there is no such class, it does not accept the arguments, or it can't serve: see `row_losses` and
            `_try_loss`.
    """
    kind = find_class(path, nn.Module, EXPECTED, imports=imports)
    for refused, better in NOT_OF_LOGITS.items():
        if issubclass(kind, refused):
            raise ConfigError(f"{OPTION}.class_path: {path} takes probabilities, and gets logits: use {better}")
    known = parameters_of(kind)
    given = {name: _tensor(value, known.get(name)) for name, value in init_args.items()}
    if "reduction" in known:
        given = {"reduction": "none"} | given
    try:
        loss = kind(**given)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(
            f"{OPTION}.init_args: {path} does not accept {dict(init_args)}: {first_line(error)}"
        ) from error
    if any(parameter.requires_grad for parameter in loss.parameters()):
        raise ConfigError(
            f"{OPTION}.class_path: {path} has parameters, which the optimizer would not train. Make them buffers, or "
            "part of the model"
        )
    _try_loss(loss, path, task, num_outputs, signed_labels)
    return loss


def row_losses(loss: nn.Module, path: str, logits: Tensor, labels: Tensor, signed_labels: bool) -> Tensor:
    """The loss of each row: [N].

    Args:
        loss: of `build_loss`.
        path: of its class, for error messages.
        logits: [N, outputs], fp32 or wider.
        labels: as in `MicroBatch`.
        signed_labels: whether the loss gets labels -1 and 1 in place of 0 and 1.

    Raises:
        ConfigError: the loss gives something else than a value for each row, or for each row and label.
    """
    if labels.ndim == 1 and labels.is_floating_point():
        logits = logits.squeeze(-1)  # as the labels: torch's losses would broadcast [N, 1] and [N] to [N, N]
    target = labels.to(logits.dtype) if labels.is_floating_point() else labels
    with torch.autocast(logits.device.type, enabled=False):
        values = loss(logits, 2 * target - 1 if signed_labels else target)
    if isinstance(values, Tensor) and values.shape == labels.shape and labels.ndim == 2:
        return values.mean(dim=1)  # of the labels, as `bce`
    if isinstance(values, Tensor) and values.shape == labels.shape[:1]:
        return values
    what = f"a tensor of shape {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
    raise ConfigError(
        f"{OPTION}.class_path: expected a value for each of {len(labels)} rows of {path}, got {what}. Effective "
        "batches are cut into micro-batches of any size, whose means are not their mean: set "
        f"{OPTION}.init_args.reduction to none, or return a tensor of shape [rows]"
    )


def _try_loss(loss: nn.Module, path: str, task: Task, num_outputs: int, signed_labels: bool) -> None:
    """Compute losses and gradients of made-up rows.

    Raises:
        ConfigError: it can't be computed; a row's value depends on the other rows; there is no gradient; or, but for a
            regression, it does not move logits to the side of their labels.
    """
    logits, labels = _made_up(task, num_outputs)
    shapes = f"logits {list(logits.shape)} and labels {list(labels.shape)} of a {task} task"

    def compute(rows: slice) -> Tensor:
        return row_losses(loss, path, logits[rows], labels[rows], signed_labels)

    logits.requires_grad_()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Using a target size")  # which is broadcast
            values = compute(slice(None))
            alone = torch.cat([compute(slice(n, n + 1)) for n in range(len(labels))])
        (gradient,) = torch.autograd.grad(values.sum(), logits)
    except TRIED_ERRORS as error:
        raise ConfigError(f"{OPTION}.class_path: {path} can't be computed of {shapes}: {first_line(error)}") from error
    if not (values.isfinite().all() and gradient.isfinite().all()):
        raise ConfigError(f"{OPTION}.class_path: {path} is not finite for {shapes}")
    if not torch.allclose(values, alone, rtol=1e-4, atol=1e-6):
        raise ConfigError(
            f"{OPTION}.class_path: {path} gives a row another value when other rows are there, or by chance: the mean "
            "of an effective batch would depend on how it is cut into micro-batches. Let each row's value depend on "
            "this row alone"
        )
    if not _moves_to_the_labels(gradient, labels, task):
        signed = task in ("binary", "multilabel") and not signed_labels
        remedy = "a loss of logits" + ", or set model.loss.signed_labels to true if it takes labels -1 and 1" * signed
        raise ConfigError(f"{OPTION}.class_path: {path} does not move logits to the side of their labels. Use {remedy}")


def _moves_to_the_labels(gradient: Tensor, labels: Tensor, task: Task) -> bool:
    """Whether gradients at logits that are on the wrong side have the right sign; of a regression: are not all zero."""
    if task == "regression":
        return bool(gradient.any())
    if task == "multiclass":
        own = gradient.gather(1, labels[:, None])
        return bool((own <= 0).all() and own.any())
    yes = labels.reshape(gradient.shape) > 0.5
    right = (gradient[yes] <= 0).all() and (gradient[~yes] >= 0).all()
    return bool(right and gradient[yes].any() and gradient[~yes].any())


def _made_up(task: Task, num_outputs: int) -> tuple[Tensor, Tensor]:
    """Logits that are on the wrong side, or (regression) near their labels, and labels as in `MicroBatch`."""
    classes = 2 if task == "binary" else max(num_outputs, 1)
    rows = torch.arange(TRIED_ROWS * classes)
    size = FAR / (1 + rows // classes)[:, None]  # 4, 2, 1.3
    if task == "regression":
        labels = rows / len(rows) + 0.5
        return (labels + 0.25 * size[:, 0])[:, None], labels
    if task == "binary":
        labels = (rows % 2).float()
        return size * (1 - 2 * labels[:, None]), labels
    chosen = (rows[:, None] % classes) == torch.arange(classes)
    logits = size * (1 - 2 * chosen.float())
    return (logits, rows % classes) if task == "multiclass" else (logits, chosen.float())


def _tensor(value: Any, parameter: Any) -> Any:
    takes = parameter is not None and "Tensor" in str(parameter.annotation)
    return torch.tensor(value, dtype=torch.float32) if takes and isinstance(value, list) else value
