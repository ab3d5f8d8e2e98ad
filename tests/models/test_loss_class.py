"""Losses by the path of their class, against torch's own means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bge.errors import ConfigError
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.losses import Loss, LossConfig
from lightning_bge.types import Schema, Task
from tests.helpers.small_models import Batches, cut_batch, quiet_trainer, random_sequences, save_model

OWN = "tests.helpers.own_classes"
N = 9
OUTPUTS: dict[str, int] = {"binary": 1, "multiclass": 3, "multilabel": 4, "regression": 1}


def rows(task: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, OUTPUTS[task], generator=generator)
    labels = {
        "binary": (torch.arange(N) % 2).float(),
        "multiclass": torch.arange(N) % 3,
        "multilabel": (torch.arange(N * 4).reshape(N, 4) % 3 == 0).float(),
        "regression": torch.randn(N, generator=generator),
    }[task]
    return logits, labels


def value(task: Task, path: str, signed: bool = False, **init_args: Any) -> Tensor:
    """The mean over an effective batch that is cut into micro-batches of 4, 3 and 2 rows."""
    loss = Loss(LossConfig(class_path=path, init_args=init_args, signed_labels=signed), task, OUTPUTS[task])
    logits, labels = rows(task)
    parts = zip(logits.split([4, 3, 2]), labels.split([4, 3, 2]), strict=True)
    return sum((loss(*part) for part in parts), torch.zeros(())) / loss.normalizer(labels)


@pytest.mark.parametrize("task", ["binary", "multilabel", "regression"])
def test_huber_is_the_mean_over_all_rows(task: Task) -> None:
    logits, labels = rows(task)
    expected = F.huber_loss(logits.reshape(labels.shape), labels, delta=0.5)
    assert torch.allclose(value(task, "torch.nn.HuberLoss", delta=0.5), expected)
    assert torch.allclose(value(task, "torch.nn.HuberLoss", delta=0.5, reduction="none"), expected)


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_signed_labels(task: Task) -> None:
    logits, labels = rows(task)
    expected = F.soft_margin_loss(logits.reshape(labels.shape), 2 * labels - 1)
    assert torch.allclose(value(task, "torch.nn.SoftMarginLoss", signed=True), expected)
    with pytest.raises(ConfigError, match=r"does not move logits to the side .*model\.loss\.signed_labels to true"):
        value(task, "torch.nn.SoftMarginLoss")


def test_classes_are_whole_numbers() -> None:
    logits, labels = rows("multiclass")
    assert torch.allclose(value("multiclass", "torch.nn.MultiMarginLoss"), F.multi_margin_loss(logits, labels))
    weighted = F.cross_entropy(logits, labels, torch.tensor([1.0, 2.0, 0.5]), reduction="none").mean()
    assert torch.allclose(value("multiclass", "torch.nn.CrossEntropyLoss", weight=[1.0, 2.0, 0.5]), weighted)


def test_a_value_for_each_row_and_label_or_for_each_row() -> None:
    logits, labels = rows("multilabel")
    hinge = ((1 - (2 * labels - 1) * logits).clamp(min=0) ** 2).mean()
    assert torch.allclose(value("multilabel", f"{OWN}.SquaredHinge"), hinge)
    soft = F.multilabel_soft_margin_loss(logits, labels)
    assert torch.allclose(value("multilabel", "torch.nn.MultiLabelSoftMarginLoss"), soft)


@pytest.mark.parametrize(
    ("task", "options", "expected"),
    [
        ("binary", {"class_path": "torch.nn.NoSuch"}, r"model\.loss\.class_path: expected the path of a class"),
        ("binary", {"class_path": "no_such.Loss"}, "No module named 'no_such'"),
        ("binary", {"class_path": "torch.optim.SGD"}, r"inherits from torch\.nn\.Module, got torch\.optim\.SGD"),
        ("binary", {"class_path": "torch.nn.HuberLoss", "init_args": {"colour": 1}}, "not accept .*colour"),
        ("binary", {"class_path": "torch.nn.HuberLoss", "init_args": {"reduction": "mean"}}, "each of 6 rows"),
        ("binary", {"class_path": "torch.nn.HuberLoss", "init_args": {"reduction": "sum"}}, "set .*reduction to none"),
        ("binary", {"class_path": "torch.nn.HuberLoss", "init_args": [1]}, "expected names and values"),
        ("binary", {"init_args": {"delta": 1}}, r"expected nothing without model\.loss\.class_path"),
        ("binary", {"signed_labels": True}, r"signed_labels: has no effect without"),
        ("regression", {"class_path": "torch.nn.HuberLoss", "signed_labels": True}, "has no labels 0 and 1"),
        ("binary", {"class_path": "torch.nn.HuberLoss", "name": "focal"}, r"model\.loss\.name: has no effect beside"),
        ("binary", {"class_path": "torch.nn.HuberLoss", "class_weights": [1.0, 2.0]}, "class_weights: has no effect"),
        ("binary", {"class_path": "torch.nn.BCELoss"}, r"takes probabilities, and gets logits: use torch\.nn\.BCEW"),
        ("multiclass", {"class_path": "torch.nn.NLLLoss"}, r"use torch\.nn\.CrossEntropyLoss"),
        ("multiclass", {"class_path": "torch.nn.HuberLoss"}, r"can't be computed of logits \[9, 3\] and labels \[9\]"),
        ("binary", {"class_path": "torch.nn.GaussianNLLLoss"}, "can't be computed of .* missing 1 required"),
        ("binary", {"class_path": f"{OWN}.LearnedLoss"}, "has parameters, which the optimizer would not train"),
        ("regression", {"class_path": f"{OWN}.CentredLoss"}, "another value when other rows are there"),
    ],
)  # fmt: skip
def test_losses_that_can_not_serve(task: Task, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        Loss(LossConfig(**options), task, OUTPUTS[task])
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- whole runs

SCHEMA = Schema("binary", ("no", "yes"), ("text",), 32)
LABELS = torch.tensor([1.0, 0, 1, 0, 1])
OPTIONS: dict[str, Any] = {"class_path": f"{OWN}.SquaredHinge", "init_args": {"margin": 2.0}}

# AdamW would blow up the rounding of gradients that are nearly 0
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}


def train(folder: str, pieces: int) -> tuple[BGEClassifier, Any]:
    batch = cut_batch(random_sequences((9, 7, 5, 4, 3), vocabulary=45), LABELS, pieces)
    module = BGEClassifier(folder, loss=OPTIONS, optimizer=SGD)  # type: ignore[arg-type]
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, datamodule=Batches(SCHEMA, [batch], [batch]))
    return module, trainer


def test_the_cut_into_micro_batches_changes_nothing_and_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    whole, trainer = train(folder, 1)
    cut, _ = train(folder, 4)
    assert whole.net is not None
    assert cut.net is not None
    for left, right in zip(whole.net.parameters(), cut.net.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert not any(
        name.startswith("loss") for name in torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    )
    loaded = BGEClassifier.load_from_checkpoint(tmp_path / "run.ckpt")
    assert loaded.hparams["loss"]["class_path"] == OPTIONS["class_path"]
    data = Batches(SCHEMA, val=[cut_batch(random_sequences((9, 7), vocabulary=45), LABELS[:2], 1)])
    found = [quiet_trainer().validate(one, datamodule=data, verbose=False) for one in (loaded, whole)]
    assert found[0] == found[1]


def test_nothing_is_imported_that_a_checkpoint_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, trainer = train(save_model(tmp_path / "model"), 1)
    (tmp_path / "foreign_loss.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    module.hparams["loss"]["class_path"] = "foreign_loss.Loss"
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = BGEClassifier.load_from_checkpoint(tmp_path / "run.ckpt")
    assert loaded.loss is None  # predictions need none
    batch = cut_batch(random_sequences((9, 7), vocabulary=45), LABELS[:2], 1)
    with pytest.raises(ConfigError, match=r"foreign_loss\.Loss comes from a checkpoint.*allow_class"):
        quiet_trainer().validate(loaded, datamodule=Batches(SCHEMA, val=[batch]), verbose=False)
