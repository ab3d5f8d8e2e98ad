"""Our sums, divided by the normalizer, against torch's own mean losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bge.errors import ConfigError
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.losses import Loss, LossConfig
from lightning_bge.types import Task

N, CLASSES = 9, 4


def mean_loss(loss: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    return loss(logits, labels) / loss.normalizer(labels)


def binary(seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randn(N, 1, dtype=torch.float64), torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0, 0])


def several_labels() -> tuple[Tensor, Tensor]:
    return torch.randn(N, CLASSES, dtype=torch.float64), (torch.rand(N, CLASSES) > 0.6).float()


def several_classes() -> tuple[Tensor, Tensor]:
    return torch.randn(N, CLASSES, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 0, 2, 2, 2])


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0)  # class weights are fp32


def test_binary_cross_entropy() -> None:
    logits, labels = binary()
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], labels.double())
    for name in ("auto", "bce"):
        assert_same(mean_loss(Loss(LossConfig(name=name), "binary", 1), logits, labels), expected)


def test_binary_weight_of_the_positives_is_pos_weight() -> None:
    logits, labels = binary()
    loss = Loss(LossConfig(class_weights=[1.0, 3.5]), "binary", 1)
    pos_weight = torch.tensor(3.5, dtype=torch.float64)
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], labels.double(), pos_weight=pos_weight)
    assert_same(mean_loss(loss, logits, labels), expected)


def test_binary_weights_of_both_classes() -> None:
    logits, labels = binary()
    loss = Loss(LossConfig(class_weights=[0.25, 3.5]), "binary", 1)
    weight = torch.where(labels > 0, 3.5, 0.25).double()
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], labels.double(), weight=weight)
    assert_same(mean_loss(loss, logits, labels), expected)


def test_binary_label_smoothing_is_that_of_two_classes() -> None:
    logits, labels = binary()
    two = torch.cat([torch.zeros_like(logits), logits], dim=1)
    expected = F.cross_entropy(two, labels.long(), label_smoothing=0.2)
    assert_same(mean_loss(Loss(LossConfig(label_smoothing=0.2), "binary", 1), logits, labels), expected)


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 3.0]])
def test_multilabel(weights: list[float] | None) -> None:
    logits, labels = several_labels()
    pos_weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    expected = F.binary_cross_entropy_with_logits(logits, labels.double(), pos_weight=pos_weight)
    loss = Loss(LossConfig(class_weights=weights), "multilabel", CLASSES)
    assert_same(mean_loss(loss, logits, labels), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 3.0]])
def test_cross_entropy(weights: list[float] | None, smoothing: float) -> None:
    logits, labels = several_classes()
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    expected = F.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing, reduction="mean")
    loss = Loss(LossConfig(class_weights=weights, label_smoothing=smoothing), "multiclass", CLASSES)
    assert_same(mean_loss(loss, logits, labels), expected)
    found = mean_loss(loss, logits.float(), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)


def test_regression() -> None:
    logits, labels = torch.randn(N, 1, dtype=torch.float64), torch.randn(N)
    loss = Loss(LossConfig(), "regression", 1)
    assert_same(mean_loss(loss, logits, labels), F.mse_loss(logits[:, 0], labels.double()))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weights", [None, [0.75, 0.25]])
def test_focal_is_the_papers_formula(gamma: float, weights: list[float] | None) -> None:
    logits, labels = binary()
    total = 0.0
    for logit, label in zip(logits[:, 0].tolist(), labels.tolist(), strict=True):
        p = float(torch.tensor(logit, dtype=torch.float64).sigmoid())
        p_t = p if label == 1 else 1 - p
        alpha = 1.0 if weights is None else weights[int(label)]
        total -= alpha * (1 - p_t) ** gamma * float(torch.tensor(p_t, dtype=torch.float64).log())
    loss = Loss(LossConfig(name="focal", focal_gamma=gamma, class_weights=weights), "binary", 1)
    assert float(mean_loss(loss, logits, labels)) == pytest.approx(total / N, rel=1e-7)


def test_focal_of_many_labels_is_the_mean_over_them() -> None:
    logits, labels = several_labels()
    each = [
        mean_loss(Loss(LossConfig(name="focal"), "binary", 1), logits[:, [label]], labels[:, label])
        for label in range(CLASSES)
    ]
    found = mean_loss(Loss(LossConfig(name="focal"), "multilabel", CLASSES), logits, labels)
    assert_same(found, torch.stack(each).mean())


@pytest.mark.parametrize("name", ["bce", "focal"])
def test_extreme_logits_stay_finite(name: Any) -> None:
    logits = torch.tensor([[1e4], [-1e4], [1e4], [-1e4]], requires_grad=True)
    loss = Loss(LossConfig(name=name), "binary", 1)(logits, torch.tensor([1.0, 0, 0, 1]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_loss_of_bf16_logits_is_computed_in_fp32() -> None:
    logits, labels = several_classes()
    loss = Loss(LossConfig(class_weights=[1.0, 2.0, 0.5, 3.0]), "multiclass", CLASSES)
    found = loss(logits.bfloat16(), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(logits.bfloat16().float(), labels))


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    _, labels = several_classes()
    counts = labels.bincount().tolist()
    loss = Loss(LossConfig(class_weights="balanced"), "multiclass", CLASSES, counts)
    expected = compute_class_weight("balanced", classes=np.arange(CLASSES), y=labels.numpy())
    assert loss.weight is not None
    torch.testing.assert_close(loss.weight, torch.tensor(expected, dtype=torch.float32))
    two = Loss(LossConfig(class_weights="balanced"), "binary", 1, [6, 3])
    assert two.weight is not None
    assert two.weight.tolist() == [0.75, 1.5]


def test_weights_are_no_part_of_a_checkpoint() -> None:
    assert not Loss(LossConfig(class_weights=[1.0, 2.0]), "binary", 1).state_dict()


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("binary", "cross_entropy"),
        ("binary", "mse"),
        ("multilabel", "cross_entropy"),
        ("multiclass", "bce"),
        ("multiclass", "focal"),
        ("regression", "bce"),
    ],
)
def test_loss_that_does_not_go_with_the_task(task: Task, name: Any) -> None:
    with pytest.raises(ConfigError, match=rf"model\.loss\.name: a {task} task takes .*, got {name}"):
        Loss(LossConfig(name=name), task, 1)


@pytest.mark.parametrize(
    ("task", "weights", "counts", "message"),
    [
        ("regression", [1.0], None, "a regression has no classes; set it to null"),
        ("multilabel", "balanced", [1, 2, 3, 4], "`balanced` is for exclusive classes; give a list"),
        ("multiclass", "balanced", None, "needs a data module that counts its classes"),
        ("multiclass", "balanced", [3, 0, 1, 5], r"training rows of every class, there are \[3, 0, 1, 5\]"),
        ("multiclass", [1.0, 2.0], None, r"expected 4 weights, one for each class, got \[1.0, 2.0\]"),
        ("binary", [1.0], None, "expected 2 weights"),
        ("multilabel", [1.0], None, "expected 4 weights"),
    ],
)
def test_class_weights_that_do_not_fit(task: Task, weights: Any, counts: list[int] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.loss\.class_weights: .*" + message):
        Loss(LossConfig(class_weights=weights), task, CLASSES, counts)


@pytest.mark.parametrize(
    ("field", "value"), [("label_smoothing", 1.0), ("label_smoothing", -0.1), ("focal_gamma", -1.0)]
)
def test_values_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"model\.loss\.{field}: expected .*, got {value}"):
        LossConfig(**{field: value})


def test_a_loss_of_another_task_is_refused_before_anything_is_built() -> None:
    assert LossConfig().name_for("regression") == "mse"
    assert LossConfig(name="focal").name_for("multilabel") == "focal"
    with pytest.raises(ConfigError, match=r"model\.loss\.name: a regression task takes mse, got focal"):
        BGEClassifier(task="regression", loss={"name": "focal"})  # type: ignore[arg-type]
