"""Trained models as one module that only predicts: a single one, or an ensemble."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.ensemble import average_predictions
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.types import Batch, Schema


class Predictor(LightningModule):
    """Computes the logits of batches by one or several models, and keeps none of them.

    Args:
        models: of one task; all of them are on the device at once.
        schema: what they read and predict.
    """

    def __init__(self, models: Sequence[BGEClassifier], schema: Schema) -> None:
        super().__init__()
        self.schema, self._models = schema, tuple(models)
        for number, model in enumerate(models):
            model.set_schema(schema)
            self.add_module(f"model_{number}", model)  # a child, which is then attached to the trainer as well

    def configure_model(self) -> None:
        """Load all weights, once."""
        for model in self._models:
            model.configure_model()

    def on_predict_start(self) -> None:
        """Refuse a head that was never trained, as each model alone does."""
        for model in self._models:
            model.on_predict_start()

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The batch's `rows` [N] and `logits` [N, models * outputs]; an empty batch gives an empty dictionary."""
        found = [model.compute_batch(batch) for model in self._models]
        if not found[0]:
            return {}
        logits = [torch.cat([part.logits for part in parts]) for parts in found]
        return {"rows": torch.cat([part.rows for part in found[0]]), "logits": torch.cat(logits, dim=-1)}

    def combine(self, found: Predictions) -> Predictions:
        """The predictions of all models together, whose scores are the mean of theirs.

        Args:
            found: with the logits of `predict_step`, on the host.
        """
        parts = found.logits.chunk(len(self._models), dim=-1)
        return average_predictions(self.schema.task, [replace(found, logits=part) for part in parts])
