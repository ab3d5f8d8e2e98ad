"""A model's outputs for some rows, and the scores that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bge.types import Task


@dataclass(frozen=True)
class Predictions:
    """A model's outputs for some rows.

    Attributes:
        rows: int64 [N], row numbers in the file, ascending.
        logits: float32 [N, outputs].
        labels: as in `MicroBatch`, or None.
        groups: int64 [N], or None.
    """

    rows: Tensor
    logits: Tensor
    labels: Tensor | None = None
    groups: Tensor | None = None

    @classmethod
    def collect(cls, parts: Sequence[Predictions]) -> Predictions:
        """Join parts into one, sorted by row."""

        def join(name: str) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            return None if tensors[0] is None else torch.cat(tensors).cpu()[order]

        rows = torch.cat([part.rows for part in parts]).cpu()
        order = rows.argsort()
        logits = join("logits")
        assert logits is not None
        return cls(rows[order], logits, join("labels"), join("groups"))


def scores(task: Task, logits: Tensor) -> Tensor:
    """Logits [N, outputs] as scores.

    Probability of yes, [N] (binary), of each class, [N, C] (multi-class), of each label, [N, L] (multi-label);
    the value itself, [N] (regression).
    """
    logits = logits.float()
    if task == "binary":
        return logits.squeeze(-1).sigmoid()
    if task == "multiclass":
        return logits.softmax(dim=-1)
    if task == "multilabel":
        return logits.sigmoid()
    return logits.squeeze(-1)


def constant_logits(task: Task, outputs: int, mean: float) -> Tensor:
    """The constant predictions: no and yes, each class, or (regression) the mean of the labels; [K, outputs]."""
    if task == "regression":
        return torch.full((1, outputs), mean)
    if task == "multiclass":
        return torch.eye(outputs) * 20
    return torch.tensor([[-20.0], [20.0]]).expand(2, outputs)
