"""Averaged predictions, and the folder of several exported models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.special import expit, softmax

from lightning_bge.errors import ConfigError
from lightning_bge.models.ensemble import average_predictions, ensemble_members, start_members, write_ensemble
from lightning_bge.models.metrics.predictions import Predictions, scores
from lightning_bge.types import Schema
from tests.helpers.small_models import save_model, word_tokenizer

SCHEMA = Schema("binary", ("no", "yes"), ("text",), 16, threshold=0.25)


@pytest.mark.parametrize(("task", "outputs"), [("binary", 1), ("multilabel", 3), ("multiclass", 3), ("regression", 1)])
def test_scores_of_an_average_are_the_mean_of_the_scores(task: Any, outputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(20, outputs, generator=generator) * 4 for _ in range(3)]
    logits[0][0] = 300.0  # probabilities of exactly 0 and 1
    logits[1][0] = logits[2][0] = 200.0
    labels = torch.arange(20)
    found = average_predictions(task, [Predictions(torch.arange(20), one, labels) for one in logits])
    function = {"multiclass": lambda x: softmax(x, axis=1), "regression": lambda x: x}.get(task, expit)
    expected = sum(function(one.double().numpy()) for one in logits) / 3
    assert found.logits.isfinite().all()
    assert found.logits.shape == (20, outputs)
    assert found.labels is labels
    assert scores(task, found.logits).reshape(20, outputs).numpy() == pytest.approx(expected, abs=1e-6, rel=1e-6)


def test_one_model_alone_is_not_changed() -> None:
    alone = Predictions(torch.arange(2), torch.tensor([[1e4], [-1e4]]))
    assert average_predictions("binary", [alone]) is alone


def test_a_folder_takes_the_place_of_an_older_export(tmp_path: Path) -> None:
    target, draft = tmp_path / "model", tmp_path / "draft"
    target.mkdir()
    SCHEMA.save(target)
    (target / "old.txt").write_text("")
    start_members(draft, {"trial": 1})
    save_model(draft / "fold-0")
    start_members(draft, {"trial": 1})
    assert (draft / "fold-0").is_dir()
    write_ensemble(draft, ["fold-0"], target, schema=SCHEMA, tokenizer=word_tokenizer(), source={"trial": 1})
    assert ensemble_members(target) == [target / "fold-0"]
    assert not (target / "old.txt").exists()
    assert Schema.load(target) == SCHEMA
    assert json.loads((target / "tokenizer_config.json").read_text())["model_max_length"] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    start_members(target, {"trial": 2})
    assert not (target / "fold-0").exists()


def test_another_folder_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    start_members(tmp_path / "draft", {})
    save_model(tmp_path / "draft" / "fold-0")
    with pytest.raises(ConfigError, match="exists and is no exported model"):
        write_ensemble(
            tmp_path / "draft", ["fold-0"], tmp_path / "texts", schema=SCHEMA, tokenizer=word_tokenizer(), source={}
        )
    assert ensemble_members(tmp_path / "texts") == []
