"""Temperature scaling: one number that makes a classifier's scores as sure as they are right (arXiv:1706.04599)."""

import math

import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor
from torchmetrics.functional import calibration_error

from lightning_bge.errors import ConfigError
from lightning_bge.models.metrics.predictions import scores
from lightning_bge.types import Task

# Of the temperature. Where the logits separate the classes, the likelihood grows without end as it falls, and where
# they say nothing, as it rises.
LOWEST, HIGHEST = 0.05, 20.0
BINS = 15  # of the calibration error, as in the paper


def check_has_probabilities(task: Task) -> None:
    """Raise `ConfigError` for a regression, whose scores are no probabilities."""
    if task == "regression":
        raise ConfigError("hpo.calibration: expected null, as a regression has no probabilities, got temperature")


def fit_temperature(task: Task, logits: Tensor, labels: Tensor) -> float:
    """The temperature T from 0.05 to 20 at which logits / T have the least negative log-likelihood.

    Args:
        task: binary, multi-label or multi-class.
        logits: [N, outputs], of rows that were not trained on.
        labels: as in `Predictions`.
    """
    logits = logits.double()

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(task, logits / math.exp(log_temperature), labels)

    # it has one minimum, as the loss is convex in 1 / T
    found = minimize_scalar(
        loss, bounds=(math.log(LOWEST), math.log(HIGHEST)), method="bounded", options={"xatol": 1e-6}
    )
    return math.exp(float(found.x))


def negative_log_likelihood(task: Task, logits: Tensor, labels: Tensor) -> float:
    """The mean over the rows, and over the labels of a multi-label task; natural logarithm, in fp64."""
    logits = logits.double()
    if task == "multiclass":
        return float(F.cross_entropy(logits, labels.long()))
    return float(F.binary_cross_entropy_with_logits(logits.reshape(labels.shape), labels.double()))


def expected_calibration_error(task: Task, logits: Tensor, labels: Tensor) -> float:
    """The mean distance between scores and frequencies, in 15 bins of equal width, weighted by the bins' rows.

    Binary and multi-label: of the score of a yes and how often it is one, all labels together. Multi-class: of the
    highest score and how often its class is right.
    """
    score = scores(task, logits)
    if task == "multiclass":
        classes = score.shape[1]
        found = calibration_error(score, labels.long(), task="multiclass", num_classes=classes, n_bins=BINS)
    else:
        found = calibration_error(score.flatten(), labels.flatten().long(), task="binary", n_bins=BINS)
    return float(found)
