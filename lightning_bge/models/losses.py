"""Losses as sums over sequences, so that an effective batch can be cut into micro-batches without changing its mean."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bge.errors import ConfigError
from lightning_bge.models.loss_class import build_loss, row_losses
from lightning_bge.runtime.class_path import check_class_option
from lightning_bge.types import Task

ALLOWED: dict[str, tuple[str, ...]] = {
    "binary": ("bce", "focal"),
    "multilabel": ("bce", "focal"),
    "multiclass": ("cross_entropy",),
    "regression": ("mse",),
}


@dataclass(frozen=True)
class LossConfig:
    """The loss and its options.

    Attributes:
        name: `auto` takes the task's usual one: bce (binary, multilabel), cross_entropy (multiclass), mse (regression).
            `focal` (Lin et al. 2017, arXiv:1708.02002) down-weights easy examples.
        focal_gamma: focusing parameter gamma of `focal`; 2 as in the paper.
        label_smoothing: fraction of the target distributed evenly over the classes, 0 to below 1.
        class_weights: `balanced` (n / (classes * count), from the training rows), or a weight for each class in the
            order of the labels (binary: negative, positive), or null. Multi-label: weights of the positives.
        class_path: a loss by its class in place of `name`, such as torch.nn.HuberLoss, or a torch.nn.Module of your
            own. It is called with logits (fp32) and labels of a micro-batch and returns a value for each row:
            binary and regression [N] and float [N], multi-class [N, C] and int64 [N], multi-label [N, L] and float
            [N, L], for which it may also return [N, L]. The loss is the mean of these values.
        init_args: arguments of the class; `reduction` is none where it is not given.
        signed_labels: give the class labels -1 and 1 in place of 0 and 1, as torch.nn.SoftMarginLoss takes them.
    """

    name: Literal["auto", "bce", "focal", "cross_entropy", "mse"] = "auto"
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0
    class_weights: Literal["balanced"] | list[float] | None = None
    class_path: str | None = None
    init_args: dict[str, Any] = field(default_factory=dict)
    signed_labels: bool = False

    def __post_init__(self) -> None:
        check_class_option(self, "model.loss", kept=("signed_labels",))
        if self.signed_labels and self.class_path is None:
            raise ConfigError("model.loss.signed_labels: has no effect without model.loss.class_path: leave it out")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"model.loss.label_smoothing: expected 0 to below 1, got {self.label_smoothing}")
        if isinstance(self.class_weights, list) and min(self.class_weights, default=1) <= 0:
            raise ConfigError(f"model.loss.class_weights: expected weights above 0, got {self.class_weights}")
        if self.focal_gamma < 0:
            raise ConfigError(f"model.loss.focal_gamma: expected 0 or more, got {self.focal_gamma}")

    def name_for(self, task: Task) -> str:
        """The loss for a task; raises `ConfigError` where the two do not go together."""
        allowed = ALLOWED[task]
        if self.signed_labels and task not in ("binary", "multilabel"):
            raise ConfigError(
                f"model.loss.signed_labels: expected false, as a {task} task has no labels 0 and 1, got true"
            )
        if self.name not in ("auto", *allowed):
            raise ConfigError(f"model.loss.name: a {task} task takes {' or '.join(allowed)}, got {self.name}")
        return allowed[0] if self.name == "auto" else self.name


class Loss(nn.Module):
    """The sum of the losses of a micro-batch's sequences; the caller divides by the effective batch's `normalizer`.

    Args:
        config: see `LossConfig`.
        task: decides which losses are allowed and the labels' form.
        num_outputs: width of the logits.
        class_counts: rows of each class among the training rows, for `balanced`.
        imports: whether the module of `class_path` may be imported; see `find_class`.

    Raises:
        ConfigError: the loss does not go with the task, or the weights do not go with the labels; a class can't serve:
            see `build_loss`.
    """

    weight: Tensor | None

    def __init__(
        self,
        config: LossConfig,
        task: Task,
        num_outputs: int,
        class_counts: Sequence[float] | None = None,
        imports: bool = True,
    ) -> None:
        super().__init__()
        self.name = config.name_for(task)
        self.config = config
        # in a tuple: it is made of `config`, so that checkpoints need not hold its buffers
        self._own: tuple[nn.Module, ...] = ()
        if config.class_path is not None:
            options = (config.init_args, task, num_outputs, config.signed_labels, imports)
            self._own = (build_loss(config.class_path, *options),)
        self.register_buffer("weight", _class_weights(config, task, num_outputs, class_counts), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum of the weighted losses: logits [N, outputs], labels as in `MicroBatch`; computed in fp32 or wider."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        smoothing = self.config.label_smoothing
        for own in self._own:
            path, signed = str(self.config.class_path), self.config.signed_labels
            return row_losses(own.to(logits.device), path, logits, labels, signed).sum()
        if self.name == "cross_entropy":
            weight = None if self.weight is None else self.weight.to(logits)
            return F.cross_entropy(logits, labels, weight, reduction="sum", label_smoothing=smoothing)
        logits = logits.squeeze(-1) if labels.ndim == 1 else logits
        target = labels.to(logits.dtype)
        if self.name == "mse":
            return F.mse_loss(logits, target, reduction="sum")
        losses = F.binary_cross_entropy_with_logits(logits, target * (1 - smoothing) + smoothing / 2, reduction="none")
        if self.name == "focal":
            right = torch.where(target > 0.5, logits.sigmoid(), (-logits).sigmoid())
            losses = (1 - right) ** self.config.focal_gamma * losses
        return (losses * self._weights(target)).sum() / (labels.shape[1] if labels.ndim == 2 else 1)

    def normalizer(self, labels: Tensor) -> Tensor | float:
        """What the sums over an effective batch are divided by: its size, or (cross-entropy) its summed weights.

        Both are what torch's own `mean` reduction does.
        """
        if self.name == "cross_entropy" and self.weight is not None:
            return self.weight[labels].sum()
        return float(len(labels))

    def _weights(self, target: Tensor) -> Tensor | float:
        if self.weight is None:
            return 1.0
        if target.ndim == 2:
            return torch.where(target > 0.5, self.weight.to(target), 1.0)
        return self.weight.to(target)[(target > 0.5).long()]


def _class_weights(config: LossConfig, task: Task, num_outputs: int, counts: Sequence[float] | None) -> Tensor | None:
    if config.class_weights is None:
        return None
    if task == "regression":
        raise ConfigError("model.loss.class_weights: a regression has no classes; set it to null")
    classes = 2 if task == "binary" else num_outputs
    if config.class_weights == "balanced":
        if task == "multilabel":
            raise ConfigError("model.loss.class_weights: `balanced` is for exclusive classes; give a list of weights")
        if counts is None:
            raise ConfigError("model.loss.class_weights: `balanced` needs a data module that counts its classes")
        count = torch.as_tensor(counts, dtype=torch.float32)
        if (count == 0).any():
            raise ConfigError(
                f"model.loss.class_weights: `balanced` needs training rows of every class, there are {list(counts)}: "
                "give a list of weights, or leave out the labels without rows"
            )
        return count.sum() / (classes * count)
    if len(config.class_weights) != classes:
        raise ConfigError(
            f"model.loss.class_weights: expected {classes} weights, one for each class, got {config.class_weights}"
        )
    return torch.tensor(config.class_weights, dtype=torch.float32)
