"""Callbacks for any Lightning project: none of them needs our module or data module."""

from lightning_bge.callbacks.precision import choose_precision
from lightning_bge.callbacks.throughput import Throughput
from lightning_bge.callbacks.train_mode import TrainMode

__all__ = ["Throughput", "TrainMode", "choose_precision"]
