"""One or several models as a module that only predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from scipy.special import softmax

from lightning_bge.errors import ConfigError
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.metrics.predictions import Predictions, scores
from lightning_bge.models.predictor import Predictor
from lightning_bge.runtime import oom
from lightning_bge.types import Batch, Schema
from tests.helpers.small_models import Loader, micro_batch, quiet_trainer, random_sequences, save_model

SCHEMA = Schema("multiclass", ("x", "y", "z"), ("text",), 32)


class Outputs(Callback):
    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_predict_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.found.append(outputs)


def models(folder: Path, count: int) -> list[BGEClassifier]:
    names = [save_model(folder / str(number), outputs=3, seed=number) for number in range(count)]
    for name in names:
        SCHEMA.save(name)
    return [BGEClassifier(name, "multiclass") for name in names]


def predict(predictor: Predictor, batches: list[Batch]) -> list[Any]:
    outputs = Outputs()
    trainer = quiet_trainer(callbacks=[outputs])
    trainer.predict(predictor, dataloaders=Loader(batches), return_predictions=False)
    return outputs.found


def batch() -> Batch:
    parts = [random_sequences(lengths, 45, seed) for seed, lengths in enumerate(((9, 7), (5, 4, 4)))]
    return Batch(tuple(micro_batch(part, rows=rows) for part, rows in zip(parts, ([3, 1], [0, 4, 2]), strict=True)))


@pytest.mark.parametrize("count", [1, 3])
def test_scores_are_the_mean_of_the_models_scores(tmp_path: Path, count: int) -> None:
    members = models(tmp_path, count)
    predictor = Predictor(members, SCHEMA)
    outputs, empty = predict(predictor, [batch(), Batch(())])
    assert empty == {}
    assert outputs["rows"].tolist() == [3, 1, 0, 4, 2]
    found = predictor.combine(Predictions.collect([Predictions(outputs["rows"], outputs["logits"])]))
    assert found.rows.tolist() == [0, 1, 2, 3, 4]
    with torch.no_grad():
        alone = [torch.cat([m.net(micro) for micro in batch().micro]) for m in members]  # type: ignore[misc]
    expected = sum(softmax(logits.double().numpy(), axis=1) for logits in alone) / count
    order = outputs["rows"].argsort().numpy()
    assert scores("multiclass", found.logits).numpy() == pytest.approx(expected[order], abs=1e-6)
    assert all(not member._parts and member.predictions is None for member in members)  # nothing is kept


def test_a_batch_that_does_not_fit_is_computed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model,) = models(tmp_path, 1)
    predictor = Predictor([model], SCHEMA)
    (expected,) = predict(predictor, [batch()])
    forward = model.net.forward  # type: ignore[union-attr]

    def small(micro: Any) -> Any:
        if sum(micro.lengths) > 9:
            raise torch.OutOfMemoryError("out of memory")
        return forward(micro)

    monkeypatch.setattr(model.net, "forward", small)
    monkeypatch.setattr(oom, "clean_up", lambda: None)
    (found,) = predict(predictor, [batch()])
    assert found["rows"].tolist() == expected["rows"].tolist()
    assert torch.allclose(found["logits"], expected["logits"], atol=1e-6)


def test_a_head_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModel

    (model,) = models(tmp_path, 1)
    AutoModel.from_pretrained(model.name_or_path).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ConfigError, match="has no trained head"):
        predict(Predictor([BGEClassifier(str(tmp_path / "encoder"), "multiclass")], SCHEMA), [batch()])
