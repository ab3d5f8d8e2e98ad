"""Pooling of token vectors, against transformers' encoder on one sequence at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from lightning_bge.data.tokens.tokenizer import load_tokenizer
from lightning_bge.errors import ConfigError
from lightning_bge.models.attention.packing import pad_to_bucket
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder import TextClassifier, load_classifier
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.models.pooling import pooling_of, set_pooling
from lightning_bge.types import Schema
from tests.helpers.small_models import (
    Batches,
    cut_batch,
    micro_batch,
    quiet_trainer,
    random_sequences,
    save_model,
    small_config,
    small_model,
    word_tokenizer,
)

LENGTHS = (40, 25, 25, 9, 3, 1)
KINDS = ["bert", "roberta", "xlm-roberta", "modernbert"]
SCHEMA = Schema("binary", ("no", "yes"), ("text_a", "text_b"), 32)


def head_of(model: Any, pooled: Tensor) -> Tensor:
    """Each architecture's head, written down once more."""
    kind = model.config.model_type
    if kind == "bert":
        return model.classifier(torch.tanh(model.bert.pooler.dense(pooled)))
    if kind == "modernbert":
        return model.classifier(model.head(pooled))
    return model.classifier.out_proj(torch.tanh(model.classifier.dense(pooled)))


def reference(model: PreTrainedModel, sequences: list[Tensor], pooling: str) -> Tensor:
    found = []
    for ids in sequences:
        hidden = model.base_model(input_ids=ids[None]).last_hidden_state[0]
        pooled = {"cls": hidden[0], "mean": hidden.mean(dim=0), "max": hidden.max(dim=0).values}[pooling]
        found.append(head_of(model, pooled[None]))
    return torch.cat(found)


def pooled_net(kind: str, pooling: Any, attention: Any, outputs: int = 3) -> TextClassifier:
    model = small_model(kind, outputs=outputs).double()
    set_pooling(model.config, pooling)
    return TextClassifier(model, attention)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
@pytest.mark.parametrize("attention", ["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients(kind: str, attention: str, pooling: str) -> None:
    sequences = random_sequences(LENGTHS)
    net, plain = pooled_net(kind, pooling, attention), small_model(kind, outputs=3).double()
    assert net.pooling == pooling
    ours, theirs = net(micro_batch(sequences)), reference(plain, sequences, pooling)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weights = torch.linspace(-1, 2, ours.numel()).double().reshape(ours.shape)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    for (name, left), right in zip(net.model.named_parameters(), plain.parameters(), strict=True):
        if right.grad is not None:
            assert left.grad is not None, name
            torch.testing.assert_close(left.grad, right.grad, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_dummy_tokens_are_not_pooled(pooling: str) -> None:
    net = pooled_net("bert", pooling, "packed").eval()
    batch = micro_batch(random_sequences(LENGTHS))
    expected = net(batch)
    net.token_bucket = 64
    assert pad_to_bucket(batch, 64).lengths != batch.lengths
    torch.testing.assert_close(net(batch), expected, rtol=1e-9, atol=1e-9)


def test_auto_is_the_checkpoints() -> None:
    for given in ("cls", "mean"):
        config = small_config("modernbert", classifier_pooling=given)
        assert set_pooling(config, "auto") == ""
        assert pooling_of(config) == given
    assert set_pooling(config, "cls") == "mean"
    assert config.classifier_pooling == "cls"
    assert pooling_of(small_config("bert")) == "cls"


@pytest.mark.parametrize("kind", ["deberta-v2", "mpnet", "distilbert"])
def test_other_heads_pool_in_their_own_way(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.pooling: expected auto, as this model is a {kind}.*got mean"):
        set_pooling(small_config(kind), "mean")
    with pytest.raises(ConfigError, match="pooling must be one of auto, cls, mean, max, got 'last'"):
        BGEClassifier("x", pooling="last")  # type: ignore[arg-type]


def test_a_head_of_another_pooling_is_only_a_start(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    assert load_classifier(folder, 1).untrained == ""
    assert load_classifier(folder, 1, pooling="cls").untrained == ""
    text = load_classifier(folder, 1, pooling="mean").untrained
    assert text == "has a head that was trained with cls pooling. Set model.pooling to auto or cls"


def test_the_encoder_cache_keeps_them_apart(tmp_path: Path) -> None:
    folder, cache = save_model(tmp_path / "model"), EncoderCache()
    assert [cache.load(folder, 1, pooling=one).pooling for one in ("cls", "mean", "cls")] == ["cls", "mean", "cls"]


# ---------------------------------------------------------------------- checkpoints and exports


def trained(folder: str, pooling: Any) -> tuple[BGEClassifier, Any]:
    batch = cut_batch(random_sequences((9, 7, 5), vocabulary=45), torch.tensor([1.0, 0, 1]), 2)
    module = BGEClassifier(folder, pooling=pooling, optimizer={"lr": 1e-2})  # type: ignore[arg-type]
    trainer = quiet_trainer(max_epochs=2, limit_val_batches=0)
    trainer.fit(module, datamodule=Batches(SCHEMA, [batch]))
    return module, trainer


TEXTS = [("w1 w2 w3", "w4"), ("w5", "w6 w7 w8 w9")]


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_an_export_is_loaded_here_and_refused_by_libraries_that_would_pool_otherwise(
    tmp_path: Path, kind: str, pooling: str
) -> None:
    start = save_model(tmp_path / "start", kind)
    module, trainer = trained(start, pooling)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    tokenizer = AutoTokenizer.from_pretrained(start)
    expected = module.predict(TEXTS, tokenizer).scores
    found = BGEClassifier.load_from_checkpoint(tmp_path / "run.ckpt")
    assert found.net is not None
    assert found.net.pooling == pooling
    torch.testing.assert_close(found.predict(TEXTS, tokenizer).scores, expected, rtol=0, atol=1e-6)

    folder = module.export(tmp_path / "exported", tokenizer)
    torch.testing.assert_close(BGEClassifier(str(folder)).predict(TEXTS).scores, expected, rtol=0, atol=1e-6)
    ours = load_tokenizer(str(folder))
    assert type(ours) is type(tokenizer)
    assert ours(*TEXTS[1])["input_ids"] == tokenizer(*TEXTS[1])["input_ids"]
    with pytest.raises(ValueError, match="model type `lightning_bge`"):
        AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(ValueError, match="model type `lightning_bge`"):
        CrossEncoder(str(folder), device="cpu")
    card = (folder / "README.md").read_text()
    assert "can't load it, as they have no such pooling or head" in card
    assert "CrossEncoder" not in card
    again = BGEClassifier(str(folder))
    again.configure_model()
    exported = again.export(tmp_path / "again", tokenizer)  # of a model that was loaded from an export
    assert json.loads((exported / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    with pytest.raises(ConfigError, match=rf"trained with {pooling} pooling. Set model\.pooling to auto or {pooling}"):
        BGEClassifier(str(folder), pooling="cls").predict(TEXTS)


def test_further_training_may_change_labels(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "start")
    module, _ = trained(folder, "mean")
    exported = module.export(tmp_path / "exported", word_tokenizer())
    net = load_classifier(str(exported), 3)
    assert (net.pooling, net.model.config.num_labels, net.model.classifier.out_features) == ("mean", 3, 3)


def test_an_export_of_first_tokens_is_transformers_own(tmp_path: Path) -> None:
    module, _ = trained(save_model(tmp_path / "start"), "cls")
    folder = module.export(tmp_path / "exported", word_tokenizer())
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    AutoModelForSequenceClassification.from_pretrained(folder)
