"""Packed and padded forwards against transformers' own model, called padded and one sequence at a time."""

from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lightning_bge.errors import ConfigError
from lightning_bge.models.encoder import TextClassifier, load_classifier
from tests.helpers.small_models import micro_batch, random_sequences, save_model, small_config, small_model

PACKABLE = {
    "bert": ("bert", {}),
    "roberta": ("roberta", {}),
    "xlm-roberta": ("xlm-roberta", {}),
    "modernbert-cls": ("modernbert", {"classifier_pooling": "cls"}),
    "modernbert-mean": ("modernbert", {"classifier_pooling": "mean"}),
}
# Longer than ModernBERT's local window of 8 tokens to each side, just within it and beside it; equal ones both as
# neighbours and apart, sorted as the data module sorts them and not.
LENGTHS = {"sorted": (90, 60, 60, 31, 10, 9, 8, 3), "unsorted": (7, 60, 7, 7, 90, 9, 60, 3)}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def reference_logits(model: PreTrainedModel, sequences: list[Tensor], types: list[Tensor] | None) -> Tensor:
    """transformers' model on padded input with an attention mask."""
    pad = nn.utils.rnn.pad_sequence
    inputs: dict[str, Any] = {
        "input_ids": pad(sequences, batch_first=True, padding_value=model.config.pad_token_id),
        "attention_mask": pad([torch.ones_like(ids) for ids in sequences], batch_first=True),
    }
    if types is not None:
        inputs["token_type_ids"] = pad(types, batch_first=True)
    return model(**inputs).logits


def one_by_one(model: PreTrainedModel, sequences: list[Tensor], types: list[Tensor] | None) -> Tensor:
    """transformers' model on each sequence alone, without any padding."""
    extra = [{} if types is None else {"token_type_ids": part[None]} for part in types or sequences]
    return torch.cat([model(input_ids=ids[None], **more).logits for ids, more in zip(sequences, extra, strict=True)])


def gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor | None]:
    """Of a sum that weighs every logit differently, so that no two sequences may change places."""
    model.zero_grad(set_to_none=True)
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
    (logits * weights).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None], tolerance: float) -> None:
    whole = torch.stack([grad.norm() for grad in theirs.values() if grad is not None]).norm()
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        found = ours[name]
        assert (found is None) == (expected is None), name
        if expected is None:
            continue
        assert found is not None
        # A key's bias adds the same to all scores of a query, which softmax removes: its gradient is zero
        # by mathematics, and what is left is rounding, which can only be compared with the whole gradient.
        scale = whole if name.endswith(("key.bias", "k.bias", "key_proj.bias")) else expected.norm()
        assert (found - expected).norm() <= tolerance * scale, name


def assert_same_logits(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


# transformers' eager ModernBERT computes its softmax in fp32, so that it is no reference for float64.
REFERENCES = {torch.float64: ("sdpa", "one by one"), torch.float32: ("sdpa", "eager", "one by one")}


@pytest.mark.parametrize("dtype", REFERENCES, ids=str)
@pytest.mark.parametrize("order", LENGTHS)
@pytest.mark.parametrize("kind", PACKABLE)
def test_packed_and_padded_equal_transformers(kind: str, order: str, dtype: torch.dtype) -> None:
    architecture, changes = PACKABLE[kind]
    model = small_model(architecture, outputs=3, **changes).to(dtype)
    lengths = LENGTHS[order]
    sequences = random_sequences(lengths)
    micro = micro_batch(sequences, token_types=architecture == "bert")
    types = None if micro.token_type_ids is None else list(micro.token_type_ids.split(lengths))

    found = {}
    for attention in ("packed", "padded"):
        ours = TextClassifier(copy.deepcopy(model), attention)  # type: ignore[arg-type]
        assert ours.attention == ("packed" if attention == "packed" else "sdpa")
        logits = ours(micro)
        assert logits.dtype == dtype
        found[attention] = logits, gradients(ours.model, logits)
    for reference in REFERENCES[dtype]:
        theirs = copy.deepcopy(model)
        theirs.set_attn_implementation("eager" if reference == "eager" else "sdpa")
        call = one_by_one if reference == "one by one" else reference_logits
        expected = call(theirs, sequences, types)
        expected_gradients = gradients(theirs, expected)
        for logits, own_gradients in found.values():
            assert_same_logits(logits, expected, TOLERANCE[dtype])
            assert_same_gradients(own_gradients, expected_gradients, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["deberta-v2", "mpnet"])
def test_other_architectures_are_padded(kind: str) -> None:
    model = small_model(kind, outputs=3).double()
    sequences = random_sequences((40, 31, 31, 9, 3))
    ours = TextClassifier(copy.deepcopy(model))
    assert not ours.packed
    expected = one_by_one(model, sequences, None)
    logits = torch.cat([ours(micro_batch(part)) for part in (sequences[:2], sequences[2:])])
    assert_same_logits(logits, expected, 1e-9)
    assert_same_gradients(gradients(ours.model, logits), gradients(model, expected), 1e-9)


@pytest.mark.parametrize("kind", ["deberta-v2", "mpnet"])
def test_packed_is_refused_where_it_would_be_wrong(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.attention is packed.*{kind}.*use auto or padded"):
        TextClassifier(small_model(kind), "packed")


def test_sequences_do_not_see_each_other() -> None:
    ours = TextClassifier(small_model("bert").double(), "packed")
    first, second, other = random_sequences((20, 12, 12))
    a, b = ours(micro_batch([first, second])), ours(micro_batch([first, other]))
    assert torch.equal(a[0], b[0])
    assert not torch.allclose(a[1], b[1])


def test_token_types_of_a_model_that_has_none_are_left_out() -> None:
    sequences = random_sequences((12, 5))
    for kind in ("xlm-roberta", "modernbert", "deberta-v2"):
        ours = TextClassifier(small_model(kind))
        assert torch.equal(ours(micro_batch(sequences, token_types=True)), ours(micro_batch(sequences)))


# ------------------------------------------------------------------ loading


def dropout_rates(model: nn.Module) -> list[float]:
    return [module.p for module in model.modules() if hasattr(module, "p") and "Dropout" in type(module).__name__]


def test_loads_in_fp32_and_train_mode(tmp_path: Path) -> None:
    small_model("bert").bfloat16().save_pretrained(tmp_path)
    loaded = load_classifier(str(tmp_path), 1)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert all(module.training for module in loaded.modules())
    stored = small_model("bert").bfloat16().state_dict()
    assert all(torch.equal(value, stored[name].float()) for name, value in loaded.model.state_dict().items())


def test_new_head_comes_from_the_seed_alone(tmp_path: Path) -> None:
    save_model(tmp_path, outputs=2)
    torch.manual_seed(7)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = load_classifier(str(tmp_path), 3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    torch.manual_seed(8)
    again, other = load_classifier(str(tmp_path), 3, seed=1), load_classifier(str(tmp_path), 3, seed=2)
    assert first.model.classifier.weight.shape == (3, 32)
    assert torch.equal(first.model.classifier.weight, again.model.classifier.weight)
    assert not torch.equal(first.model.classifier.weight, other.model.classifier.weight)
    body = first.model.bert.state_dict()
    assert all(torch.equal(value, body[name]) for name, value in other.model.bert.state_dict().items())


def test_head_that_fits_is_kept(tmp_path: Path) -> None:
    save_model(tmp_path, outputs=3)
    stored = AutoModelForSequenceClassification.from_pretrained(tmp_path).state_dict()
    loaded = load_classifier(str(tmp_path), 3).model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in stored.items())


def test_a_new_head_is_logged_once_and_nothing_else_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    save_model(tmp_path, outputs=2)
    verbosity = transformers_logging.get_verbosity()
    capfd.readouterr()
    with caplog.at_level(logging.INFO):
        load_classifier(str(tmp_path), 1)
        load_classifier(str(tmp_path), 1)
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.get_verbosity() == verbosity
    assert transformers_logging.is_progress_bar_enabled()
    [message] = [record.getMessage() for record in caplog.records if record.name.startswith("lightning_bge")]
    assert "no head of this shape" in message
    assert "classifier.weight" in message


def test_warns_where_weights_of_the_encoder_are_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = small_model("bert")
    weights = {name: value for name, value in model.state_dict().items() if "layer.1.output.dense" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    load_classifier(str(tmp_path), 1)
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "2 weights are not in the checkpoint" in record.getMessage()
    assert "bert.encoder.layer.1.output.dense.weight" in record.getMessage()


def test_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_model(tmp_path / "model")
    assert load_classifier("~/model", 1).packed


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "modernbert", "deberta-v2", "distilbert"])
def test_dropout_reaches_every_module(tmp_path: Path, kind: str) -> None:
    small_model(kind, dropout=0.1).save_pretrained(tmp_path)
    kept, changed = load_classifier(str(tmp_path), 1), load_classifier(str(tmp_path), 1, dropout=0.37)
    assert 0.37 not in dropout_rates(kept)
    assert len(dropout_rates(changed)) >= 3
    assert set(dropout_rates(changed)) == {0.37}
    rates = {name: value for name, value in vars(changed.model.config).items() if "dropout" in name}
    assert {value for value in rates.values() if value is not None} == {0.37}
    off = load_classifier(str(tmp_path), 1, dropout=0.0)
    assert set(dropout_rates(off)) <= {0.0}
    micro = micro_batch(random_sequences((12, 5), vocabulary=45))
    assert torch.equal(off(micro), off(micro))


def test_attention_dropout_is_on_in_train_mode_alone() -> None:
    model = small_model("bert", dropout=0.0)
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.3
    micro = micro_batch(random_sequences((12, 5)))
    ours = TextClassifier(model, "packed")
    assert not torch.equal(ours(micro), ours(micro))
    ours.eval()
    assert torch.equal(ours(micro), ours(micro))


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "modernbert"])
def test_dropout_of_the_head_is_on_in_train_mode_alone(kind: str) -> None:
    """Packed, the head is called by us; MLP and attention have no dropout here."""
    config = small_config(kind)
    config.classifier_dropout = 0.5
    model = AutoModelForSequenceClassification.from_config(config)
    micro = micro_batch(random_sequences((12, 5)))
    ours = TextClassifier(model, "packed").train()
    assert not torch.equal(ours(micro), ours(micro))
    ours.eval()
    assert torch.equal(ours(micro), ours(micro))


def broken_folder(tmp_path: Path, fault: str) -> str:
    folder = tmp_path / "model"
    if fault == "missing":
        return str(folder)
    save_model(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if fault == "no config":
        config.unlink()
    elif fault == "no weights":
        weights.unlink()
    elif fault == "torn weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif fault == "torn config":
        config.write_text(config.read_text()[:50])
    elif fault == "no text classifier":
        config.write_text('{"model_type": "clip"}')
    elif fault == "unknown architecture":
        config.write_text('{"model_type": "nonesuch"}')
    return str(folder)


@pytest.mark.parametrize(
    "fault",
    ["no config", "no weights", "torn weights", "torn config", "no text classifier", "unknown architecture"],
)
def test_folder_that_holds_no_model(tmp_path: Path, fault: str) -> None:
    folder = broken_folder(tmp_path, fault)
    with pytest.raises(ConfigError, match=r"model\.name_or_path: .*it needs a config\.json and") as raised:
        load_classifier(folder, 1)
    assert folder in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["missing", "BAAI/bge-small-en-v1.5", "nonesuch"])
def test_model_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    path = broken_folder(tmp_path, name) if name == "missing" else name
    told = "the folder .* does not exist" if name == "missing" else "neither a folder nor .*Check the name, the network"
    with pytest.raises(ConfigError, match=told):
        load_classifier(path, 1)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "mpnet", "distilbert"])
def test_the_longest_sequence_is_the_longest_that_the_model_takes(kind: str) -> None:
    net = TextClassifier(small_model(kind)).eval()
    limit = net.max_positions
    with torch.no_grad():
        assert net(micro_batch(random_sequences([limit]))).shape == (1, 1)
        with pytest.raises((IndexError, RuntimeError)):
            net(micro_batch(random_sequences([limit + 1])))


@pytest.mark.parametrize("kind", ["modernbert", "deberta-v2"])
def test_models_without_absolute_positions_have_no_limit(kind: str) -> None:
    changes = {"position_biased_input": False} if kind == "deberta-v2" else {}
    assert TextClassifier(small_model(kind, **changes)).max_positions == sys.maxsize
