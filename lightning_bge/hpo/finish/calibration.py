"""The temperature of the exported model, fitted on out-of-fold predictions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.hpo.trial.out_of_fold import load_predictions
from lightning_bge.hpo.trial.text_setup import TextTrialSetup
from lightning_bge.models.checkpoint_head import Outputs
from lightning_bge.models.encoder import TextClassifier, load_classifier
from lightning_bge.models.output.calibration import (
    HIGHEST,
    LOWEST,
    check_has_probabilities,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
)
from lightning_bge.models.output.inference import encode_texts
from lightning_bge.models.output.output_layer import find_output_layer
from lightning_bge.runtime.locations import Location
from lightning_bge.types import Task

FIGURES = {
    "negative_log_likelihood": negative_log_likelihood,
    "expected_calibration_error": expected_calibration_error,
}


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it changes.

    Attributes:
        temperature: fitted on all rows.
        before: negative log-likelihood and expected calibration error of the logits.
        after: those of the logits divided by temperatures that were fitted on other folds.
        note: on which rows the temperature was fitted and the figures measured.
    """

    temperature: float
    before: dict[str, float]
    after: dict[str, float]
    note: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the summary."""
        return {"method": "temperature", **vars(self)}


def calibrate_out_of_fold(path: Location, task: Task) -> Calibration:
    """Fit the temperature on the out-of-fold predictions, and judge temperatures on rows they were not fitted on.

    Args:
        path: of the predictions, as `save_predictions` wrote them.
        task: of the model.

    Raises:
        ConfigError: the task is a regression.
    """
    check_has_probabilities(task)
    predictions, fold = load_predictions(path)
    logits, labels = predictions.logits, predictions.labels
    assert labels is not None
    temperature, folds = fit_temperature(task, logits, labels), fold.unique().tolist()
    if len(folds) == 1:
        scaled, note = logits / temperature, "fitted and measured on the same validation rows: optimistic"
    else:
        scaled, note = (
            torch.empty_like(logits),
            "fitted on all folds; each fold is measured with one of the other folds",
        )
        for k in folds:
            others = fold != k
            scaled[~others] = logits[~others] / fit_temperature(task, logits[others], labels[others])
    if not 1.01 * LOWEST < temperature < HIGHEST / 1.01:
        note += f"; the temperature is at its limit, {temperature:.3g}"
    before, after = ({name: figure(task, one, labels) for name, figure in FIGURES.items()} for one in (logits, scaled))
    return Calibration(temperature, before, after, note)


def check_calibration(setups: Iterable[TextTrialSetup]) -> None:
    """Check that a temperature can be built into each model, before the first trial. Each is read once.

    Raises:
        ConfigError: the task is a regression, or a head has no layer that gives the logits.
    """
    for setup in setups:
        model, data = setup.model, setup.datamodule
        assert data.schema is not None
        check_has_probabilities(data.schema.task)
        options = {name: model.hparams[name] for name in ("revision", "trust_remote_code", "pooling")}
        options["head"] = model.head_config
        outputs = Outputs(data.schema.task, data.schema.labels)
        output_layer(load_classifier(model.name_or_path, outputs, **options), data)


def output_layer(net: TextClassifier, data: TextDataModule) -> nn.Linear:
    """The layer whose output is the logits.

    Raises:
        ConfigError: there is none.
    """
    assert data.schema is not None
    row = ("text",) * len(data.schema.text_columns)
    [micro] = encode_texts([row], data.new_tokenizer(), data.schema, max_tokens=data.schema.max_length)
    return find_output_layer(net, micro.to(next(net.parameters()).device))
