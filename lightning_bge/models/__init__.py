"""Encoders, heads, losses, optimizer and the LightningModule."""

from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder import TextClassifier, load_classifier
from lightning_bge.models.losses import Loss, LossConfig
from lightning_bge.models.metrics import Predictions, best_threshold, compute_metrics
from lightning_bge.models.optim import OptimizerConfig, ScheduleConfig
from lightning_bge.models.savers import SaversConfig
from lightning_bge.models.warm import WarmEncoder

__all__ = [
    "BGEClassifier",
    "Loss",
    "LossConfig",
    "OptimizerConfig",
    "Predictions",
    "SaversConfig",
    "ScheduleConfig",
    "TextClassifier",
    "WarmEncoder",
    "best_threshold",
    "compute_metrics",
    "load_classifier",
]
