"""What the model of an inner study predicts for its outer fold in a nested cross-validation: kept on the disk."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.models.losses import Loss
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.runtime.run_folder import write_atomically

OUTER_ROWS = "outer_fold.safetensors"  # file in the run folder of an inner study


@dataclass(frozen=True)
class OuterFold:
    """Predictions for the N rows of an outer fold.

    Attributes:
        predictions: with labels; with groups where rows are not independent.
        threshold: of decisions (binary, multi-label), which the inner study has chosen.
        losses: float [N], what each row adds to the loss.
        loss_shares: float [N], what each row adds to the divisor of the loss: 1, or the weight of its class.
    """

    predictions: Predictions
    threshold: float = 0.5
    losses: Tensor | None = None
    loss_shares: Tensor | None = None


def save_outer_fold(run_dir: Path, predictions: Predictions, loss: Loss) -> None:
    """Write what a model predicts, with the loss of each row.

    Args:
        run_dir: of the inner study.
        predictions: with labels.
        loss: of the model.
    """
    assert predictions.labels is not None
    loss = loss.cpu()
    tensors = {name: value for name, value in vars(predictions).items() if value is not None}
    rows = list(zip(predictions.logits.split(1), predictions.labels.split(1), strict=True))
    tensors["losses"] = torch.stack([loss(*row) for row in rows]).double()
    tensors["loss_shares"] = torch.tensor([float(loss.normalizer(label)) for _, label in rows]).double()
    write_atomically(run_dir / OUTER_ROWS, lambda draft: save_file(tensors, draft))


def save_if_outer_fold(run_dir: Path, data: TextDataModule, predictions: Predictions | None, loss: Loss | None) -> None:
    """As `save_outer_fold`, where the test rows of a data module are those of an outer fold."""
    if data.split.outer_fold is not None:
        assert predictions is not None
        assert loss is not None
        save_outer_fold(run_dir, predictions, loss)


def load_outer_fold(run_dir: Path, threshold: float | None) -> OuterFold:
    """Read what `save_outer_fold` wrote; `threshold`: of the inner study, None where the task has none."""
    tensors = load_file(run_dir / OUTER_ROWS)
    losses, shares = tensors.pop("losses"), tensors.pop("loss_shares")
    return OuterFold(Predictions(**tensors), 0.5 if threshold is None else threshold, losses, shares)
