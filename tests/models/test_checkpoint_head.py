"""Heads of checkpoints of transformers: their outputs are matched by name, never permuted, and new heads are known."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from lightning_bge.errors import ConfigError
from lightning_bge.models.checkpoint_head import Outputs
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder import TextClassifier, load_classifier
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.models.ensemble import Ensemble
from lightning_bge.types import Schema
from tests.helpers.small_models import (
    Batches,
    cut_batch,
    micro_batch,
    quiet_trainer,
    random_sequences,
    small_config,
    small_model,
    word_tokenizer,
)

YES_NO = Outputs("binary", ("no", "yes"))
ABC = Outputs("multiclass", ("a", "b", "c"))
SEQUENCES = random_sequences((9, 7, 7, 3))


def checkpoint(
    folder: Path, names: Sequence[str] | None, outputs: int = 0, problem: str | None = None, kind: str = "bert"
) -> str:
    """A model with a trained head, whose outputs have these names; None: transformers' own."""
    model = small_model(kind, outputs or len(names or ()))
    model.config.problem_type = problem
    if names is not None:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: number for number, name in enumerate(names)}
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def logits_of_transformers(folder: str) -> Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.cat([model(ids[None]).logits for ids in SEQUENCES])


def logits(net: TextClassifier) -> Tensor:
    with torch.no_grad():
        return net.eval()(micro_batch(SEQUENCES))


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "distilbert", "deberta-v2"])
@pytest.mark.parametrize(("names", "yes"), [(("no", "yes"), 1), (("yes", "no"), 0), (None, 1), (("0", "1"), 1)])
def test_two_logits_of_a_binary_checkpoint_give_its_softmax(
    tmp_path: Path, kind: str, names: tuple[str, ...] | None, yes: int
) -> None:
    folder = checkpoint(tmp_path, names, 2, "single_label_classification", kind)
    net = load_classifier(folder, YES_NO)
    expected = logits_of_transformers(folder).softmax(-1)[:, yes]
    torch.testing.assert_close(logits(net)[:, 0].sigmoid(), expected, atol=1e-5, rtol=1e-4)
    assert (net.untrained, net.model.config.num_labels) == ("", 1)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize(
    ("task", "problem"), [("multiclass", "single_label_classification"), ("multilabel", "multi_label_classification")]
)
def test_classes_in_another_order_are_matched_by_name(tmp_path: Path, kind: str, task: str, problem: str) -> None:
    folder = checkpoint(tmp_path, ("c", "a", "b"), problem=problem, kind=kind)
    net = load_classifier(folder, Outputs(task, ("a", "b", "c")))  # type: ignore[arg-type]
    expected = logits_of_transformers(folder)[:, [1, 2, 0]]
    torch.testing.assert_close(logits(net), expected, atol=1e-5, rtol=1e-4)
    assert net.untrained == ""


def test_the_same_order_leaves_the_weights_as_they_are(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, ("a", "b", "c"))
    expected = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    found = load_classifier(folder, ABC).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("names", "outputs", "said"),
    [
        (("LABEL_0", "LABEL_1", "LABEL_2"), ABC, "taken as 'a', 'b', 'c', in this order"),
        (("0", "1", "2"), ABC, "in this order"),
        (("A", "B ", "c"), ABC, "its classes 'A', 'B ', 'c' are taken as 'a', 'b', 'c'"),
        (("cafe\u0301", "a"), Outputs("multiclass", ("caf\u00e9", "a")), "are taken as"),
        (("False", "True"), Outputs("binary", ("0", "1")), "its classes 'False', 'True' are taken as '0', '1'"),
        (("LABEL_0",), YES_NO, "its one output is taken as the score of 'yes'"),
        (("LABEL_0", "LABEL_1"), YES_NO, "taken as 'no', 'yes', in this order"),
    ],
)
def test_names_that_do_not_say_it_are_taken_in_order_and_said(
    tmp_path: Path, names: tuple[str, ...], outputs: Outputs, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint(tmp_path, names)
    with caplog.at_level(logging.INFO, "lightning_bge"):
        assert load_classifier(folder, outputs).untrained == ""
    assert [said in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize(("name", "sign"), [("yes", 1), ("no", -1), ("Yes", 1)])
def test_one_logit_with_a_name(tmp_path: Path, name: str, sign: int) -> None:
    """The folder that this package exports, without its schema."""
    folder = checkpoint(tmp_path, (name,))
    torch.testing.assert_close(logits(load_classifier(folder, YES_NO)), sign * logits_of_transformers(folder))


def test_a_regression_keeps_its_head(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, None, 1, "regression")
    net = load_classifier(folder, Outputs("regression"))
    assert net.untrained == ""
    torch.testing.assert_close(logits(net), logits_of_transformers(folder))


REFUSED = [
    (("a", "b", "d"), None, ABC, r"for the classes 'a', 'b', 'd', and those of the data are 'a', 'b', 'c'\. Set data"),
    (("a", "b"), None, ABC, r"has a head of 2 outputs, 'a', 'b', and a multiclass task of these data has 3"),
    (("a", "b", "c"), None, YES_NO, r"a head of 3 outputs.*a binary task of these data has 1 or 2\. Set model\.task"),
    (("good", "bad"), None, YES_NO, r"the classes 'good', 'bad', and those of the data are 'no', 'yes'"),
    (("good",), None, YES_NO, r"the classes 'good', and those of the data are 'no', 'yes'"),
    (("LABEL_0",), "regression", YES_NO, r"a head for regression, and the task is binary\. Set model\.task to regr"),
    (("a", "b", "c"), "multi_label_classification", ABC, r"the task is multiclass\. Set model\.task to multilabel"),
    (("a", "a", "b"), None, ABC, r"has outputs of the same name, 'a', 'a', 'b'\. Correct id2label in its config"),
    (("yes", "yes"), None, YES_NO, r"has outputs of the same name, 'yes', 'yes'"),
    (("a", "a", "b"), None, Outputs("multiclass", ("a", "b")), r"has outputs of the same name"),
    (("a", "b", "c"), None, Outputs("regression"), r"a head of 3 outputs.*a regression task of these data has 1"),
]


@pytest.mark.parametrize(("names", "problem", "outputs", "expected"), REFUSED)
def test_a_head_for_something_else_is_new_and_said(
    tmp_path: Path,
    names: tuple[str, ...],
    problem: str | None,
    outputs: Outputs,
    expected: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = checkpoint(tmp_path, names, problem=problem)
    with caplog.at_level(logging.INFO, "lightning_bge"):
        net = load_classifier(folder, outputs)
    net_again = load_classifier(folder, outputs)
    assert [": its last layer starts at random" in record.message for record in caplog.records] == [True]
    old = AutoModelForSequenceClassification.from_pretrained(folder).classifier.weight
    new = net.model.classifier.weight
    assert new.shape[0] == outputs.count
    assert new.shape != old.shape or not torch.equal(new, old)
    assert torch.equal(new, net_again.model.classifier.weight)
    with pytest.raises(ConfigError, match=expected):
        raise ConfigError(net.untrained)


def trained_on(folder: str, schema: Schema) -> tuple[BGEClassifier, Batches]:
    labels = torch.tensor([0.0, 1.0, 1.0, 0.0])
    batch = [cut_batch(SEQUENCES, labels, 1)]
    return BGEClassifier(folder, task=schema.task), Batches(schema, batch, batch)


BINARY = Schema("binary", ("no", "yes"), ("text",), 32)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_plain_encoder_does_not_predict(tmp_path: Path, command: str) -> None:
    AutoModel.from_config(small_config("bert")).save_pretrained(tmp_path)
    model, data = trained_on(str(tmp_path), BINARY)
    with pytest.raises(ConfigError, match=rf"name_or_path: {tmp_path} has no trained head: classifier\.bias.*random"):
        getattr(quiet_trainer(), command)(model, datamodule=data)


def test_a_plain_encoder_predicts_once_it_is_trained(tmp_path: Path) -> None:
    AutoModel.from_config(small_config("bert")).save_pretrained(tmp_path)
    model, data = trained_on(str(tmp_path), BINARY)
    trainer = quiet_trainer()
    trainer.fit(model, datamodule=data)
    assert trainer.test(model, datamodule=data, verbose=False)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh, data = trained_on(str(tmp_path), BINARY)
    quiet_trainer().test(fresh, datamodule=data, ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True)


def test_texts_are_not_predicted_with_a_new_head(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, ("a", "b", "c"))
    model = BGEClassifier(folder)
    model.set_schema(BINARY)
    with pytest.raises(ConfigError, match="has a head of 3 outputs"):
        model.predict(["w1"])


def test_the_cache_of_encoders_matches_as_well(tmp_path: Path) -> None:
    folder, cache = checkpoint(tmp_path, ("b", "a")), EncoderCache()
    found = [logits(cache.load(folder, Outputs("binary", labels))) for labels in (("a", "b"), ("b", "a"))]
    torch.testing.assert_close(found[0], -found[1])
    assert cache.load(folder, Outputs("binary", ("x", "y"))).untrained


def test_an_ensemble_with_a_lost_head_is_refused(tmp_path: Path) -> None:
    from lightning_bge.runtime.run_folder import write_json

    AutoModel.from_config(small_config("bert")).save_pretrained(tmp_path / "0")
    word_tokenizer().save_pretrained(tmp_path)
    BINARY.save(tmp_path)
    write_json(tmp_path / "ensemble.json", {"members": ["0"], "source": {}})
    with pytest.raises(ConfigError, match="0 has no trained head"):
        Ensemble(tmp_path)
