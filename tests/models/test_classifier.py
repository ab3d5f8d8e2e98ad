"""`BGEClassifier` in a real Trainer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lightning_bge.errors import ConfigError
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.losses import LossConfig
from lightning_bge.models.optimizer import OptimizerConfig, ScheduleConfig
from lightning_bge.types import Batch, Schema
from tests.helpers.small_models import Batches, Loader, cut_batch, quiet_trainer, random_sequences, save_model

LENGTHS = (20, 17, 17, 12, 9, 9, 9, 6, 5, 4, 4, 3, 2)
BINARY = Schema("binary", ("no", "yes"), ("a",), 32)
CLASSES = Schema("multiclass", ("x", "y", "z"), ("a",), 32)
LABELS = Schema("multilabel", ("x", "y", "z"), ("a",), 32)
NUMBER = Schema("regression", (), ("a",), 32)
FAST = OptimizerConfig(lr=1e-2)
FLAT = ScheduleConfig("constant", warmup=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT with a head for one output."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dropout_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("dropout"), dropout=0.2)


def random_labels(schema: Schema, count: int) -> Tensor:
    if schema.task == "multiclass":
        return torch.randint(0, 3, (count,))
    if schema.task == "multilabel":
        return (torch.rand(count, 3) < 0.4).float()
    return torch.randn(count) if schema.task == "regression" else (torch.rand(count) < 0.4).float()


def learnable(rows: int = 24, pieces: int = 2, size: int = 6) -> list[Batch]:
    """A yes where the second token is an even one."""
    sequences = random_sequences([5 + row % 7 for row in range(rows)], vocabulary=45)
    labels = torch.tensor([float(ids[1] % 2 == 0) for ids in sequences])
    batches = []
    for start in range(0, rows, size):
        stop = start + size
        batch = cut_batch(sequences[start:stop], labels[start:stop], pieces)
        batches.append(Batch(tuple(replace(micro, rows=micro.rows + start) for micro in batch.micro)))
    return batches


# ------------------------------------------------------------------ loss and gradient of an effective batch


class InFloat64(BGEClassifier):
    def configure_model(self) -> None:
        super().configure_model()
        self.double()


class Gradients(Callback):
    """The gradients that an optimizer step is made with."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.found = {name: p.grad.clone() for name, p in pl_module.net.model.named_parameters()}


def one_step(
    folder: str, schema: Schema, loss: LossConfig, batch: Batch, clip: float | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Gradients, weights after the step, and the logged loss."""
    optimizer = OptimizerConfig(lr=1e-3, max_grad_norm=clip)
    module = InFloat64(folder, schema.task, loss, optimizer, FLAT, dropout=0.0)
    gradients = Gradients()
    trainer = quiet_trainer(max_steps=1, callbacks=[gradients], limit_val_batches=0)
    trainer.fit(module, datamodule=Batches(schema, [batch]))
    return gradients.found, module.net.model.state_dict(), float(trainer.callback_metrics["train_loss"])


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative norm; of key biases against the whole, as their gradient is zero but for rounding."""
    whole = torch.stack([value.double().norm() for value in theirs.values()]).norm()
    return max(
        float((ours[name] - value).norm() / (whole if name.endswith("key.bias") else value.norm()))
        for name, value in theirs.items()
    )


LOSSES = {
    "bce": (BINARY, LossConfig()),
    "bce weighted and smoothed": (BINARY, LossConfig(class_weights=[0.5, 3.0], label_smoothing=0.1)),
    "focal": (BINARY, LossConfig("focal")),
    "cross-entropy": (CLASSES, LossConfig()),
    "cross-entropy weighted and smoothed": (CLASSES, LossConfig(class_weights=[1.0, 4.0, 0.5], label_smoothing=0.1)),
    "multi-label": (LABELS, LossConfig(class_weights=[1.0, 2.0, 3.0])),
    "regression": (NUMBER, LossConfig()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_cut_of_an_effective_batch_changes_nothing(folder: str, name: str) -> None:
    schema, loss = LOSSES[name]
    sequences, labels = random_sequences(LENGTHS, vocabulary=45), random_labels(schema, 13)
    whole = one_step(folder, schema, loss, cut_batch(sequences, labels, 1))
    for pieces in (2, 5, 13):
        batch = cut_batch(sequences, labels, pieces)
        assert len(batch.micro) == pieces
        gradients, weights, mean = one_step(folder, schema, loss, batch)
        assert difference(gradients, whole[0]) < 1e-9
        assert difference(weights, whole[1]) < 1e-9
        assert mean == pytest.approx(whole[2], rel=1e-6)  # summed up in fp32


def test_the_step_is_that_of_a_plain_training_loop(folder: str) -> None:
    """transformers' model one by one, torch's mean loss, one clipped step of a plain AdamW."""
    sequences, labels = random_sequences(LENGTHS, vocabulary=45), random_labels(BINARY, 13)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64)
    start = copy.deepcopy(theirs.state_dict())
    logits = torch.cat([theirs(input_ids=ids[None]).logits for ids in sequences])[:, 0]
    expected = nn.functional.binary_cross_entropy_with_logits(logits, labels.double())
    expected.backward()
    expected = expected.detach()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.25)
    assert norm > 0.25
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.01}]
    torch.optim.AdamW(groups, lr=1e-3, fused=False).step()

    gradients, weights, mean = one_step(folder, BINARY, LossConfig(), cut_batch(sequences, labels, 5), clip=0.25)
    assert mean == pytest.approx(float(expected), rel=1e-6)
    assert difference(gradients, {name: p.grad for name, p in theirs.named_parameters()}) < 1e-9
    moved = {name: value - start[name] for name, value in theirs.state_dict().items()}
    assert difference({name: weights[name] - start[name] for name in moved}, moved) < 1e-7


# ------------------------------------------------------------------ training


def test_learns_and_logs(folder: str) -> None:
    batches = learnable()
    module = BGEClassifier(folder, optimizer=FAST, schedule=FLAT, dropout=0.0)
    losses = []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            losses.append(float(trainer.callback_metrics.get("train_loss", torch.nan)))

    trainer = quiet_trainer(max_epochs=15, callbacks=[Watch()], check_val_every_n_epoch=15)
    trainer.fit(module, datamodule=Batches(BINARY, batches, batches))
    assert losses[-1] < 0.1 < 0.5 < losses[1]
    metrics = trainer.callback_metrics
    assert metrics.keys() == {"train_loss", *(f"val_{m}" for m in module_metrics())}
    assert metrics["val_accuracy"] == 1
    assert metrics["val_loss"] < 0.1
    assert not module._parts


def module_metrics() -> tuple[str, ...]:
    decided = ("f1", "accuracy", "precision", "recall")
    return (*decided, *(f"tuned_{name}" for name in decided), "auroc", "average_precision", "loss")


def test_predictions_are_sorted_and_those_of_the_model(folder: str) -> None:
    batches = learnable()
    module = BGEClassifier(folder)
    trainer = quiet_trainer()
    trainer.validate(module, datamodule=Batches(BINARY, val=batches), verbose=False)
    found = module.predictions
    assert found is not None
    assert found.rows.tolist() == list(range(24))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    ids = {
        row: part
        for batch in batches
        for micro in batch.micro
        for row, part in zip(micro.rows.tolist(), micro.input_ids.split(micro.lengths), strict=True)
    }
    with torch.no_grad():
        expected = torch.cat([model(input_ids=ids[row][None]).logits for row in range(24)])
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
    assert found.labels is not None
    loss = nn.functional.binary_cross_entropy_with_logits(expected[:, 0], found.labels)
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(float(loss), rel=1e-4)

    rows = quiet_trainer().predict(module, datamodule=Batches(BINARY, val=batches))
    assert rows is not None
    assert sorted(row for batch in rows for row in batch["rows"].tolist()) == list(range(24))
    torch.testing.assert_close(module.predictions.logits, found.logits)


def test_later_runs_start_from_the_trained_weights(folder: str) -> None:
    batches = learnable()
    data = Batches(BINARY, batches, batches)
    module = BGEClassifier(folder, optimizer=FAST)
    trainer = quiet_trainer()
    trainer.fit(module, datamodule=data)
    [found] = quiet_trainer().validate(module, datamodule=data, verbose=False)
    assert found["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]), rel=1e-6)


def test_an_interrupted_validation_leaves_nothing_behind(folder: str) -> None:
    class CutOff(Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            raise RuntimeError("out of memory")

    module, data = BGEClassifier(folder), Batches(BINARY, val=learnable())
    with pytest.raises(RuntimeError, match="out of memory"):
        quiet_trainer(callbacks=[CutOff()]).validate(module, datamodule=data, verbose=False)
    quiet_trainer().validate(module, datamodule=data, verbose=False)
    assert module.predictions.rows.tolist() == list(range(24))


def test_test_metrics_are_per_class_too(tmp_path: Path) -> None:
    module = BGEClassifier(save_model(tmp_path, outputs=3), "multiclass")
    batch = cut_batch(random_sequences(LENGTHS, vocabulary=45), torch.arange(13) % 3, 2)
    [found] = quiet_trainer().test(module, datamodule=Batches(CLASSES, val=[batch]), verbose=False)
    assert {f"test_recall/{label}" for label in "xyz"} < found.keys()


def test_micro_batch_without_labels_is_predicted(folder: str) -> None:
    batch = Batch(tuple(replace(micro, labels=None) for micro in learnable()[0].micro))
    module = BGEClassifier(folder)
    quiet_trainer().predict(module, datamodule=Batches(BINARY, val=[batch]))
    assert module.predictions is not None
    assert module.predictions.labels is None


class Forwards(Callback):
    """Two forwards of the same batch, and the modules' modes, in training and in validation."""

    def __init__(self) -> None:
        self.trained: list[tuple[bool, bool]] = []
        self.validated: list[tuple[bool, bool]] = []

    def draw(self, module: Any, batch: Batch) -> tuple[bool, bool]:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            same = torch.equal(module(batch), module(batch))
        return same, all(part.training for part in module.net.modules())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self.trained.append(self.draw(pl_module, batch))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, *_: Any) -> None:
        self.validated.append(self.draw(pl_module, batch))


def test_dropout_is_on_in_training_and_off_in_validation(dropout_folder: str) -> None:
    """`from_pretrained` gives eval mode, and Lightning leaves it at that."""
    module, batches = BGEClassifier(dropout_folder), learnable()[:2]
    forwards = Forwards()
    for _ in range(2):
        quiet_trainer(max_epochs=2, callbacks=[forwards]).fit(module, datamodule=Batches(BINARY, batches, batches))
    assert forwards.trained == [(False, True)] * 8
    assert forwards.validated == [(True, False)] * 8


def test_every_step_draws_its_own_dropout_masks(dropout_folder: str) -> None:
    [batch] = learnable(rows=6)
    drawn: list[Tensor] = []

    class Watch(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net.register_forward_hook(lambda _, __, logits: drawn.append(logits.detach()))

    module = BGEClassifier(dropout_folder, optimizer=OptimizerConfig(lr=1e-30))
    trainer = quiet_trainer(max_epochs=4, limit_val_batches=0, callbacks=[Watch()])
    trainer.fit(module, datamodule=Batches(BINARY, [batch]))
    assert len(drawn) == 4 * len(batch.micro)
    steps = [torch.cat(drawn[start : start + 2]) for start in range(0, len(drawn), 2)]
    assert len({tuple(step.flatten().tolist()) for step in steps}) == 4


def fit(folder: str, batches: Sequence[Batch], seed: int = 1, noise: int = 0, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(noise)
    module = BGEClassifier(folder, optimizer=FAST, seed=seed, **options)
    trainer = quiet_trainer(max_epochs=2, limit_val_batches=0)
    trainer.fit(module, datamodule=Batches(BINARY, batches))
    return module.net.model.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_seed_alone_decides(dropout_folder: str) -> None:
    batches = learnable()
    first = fit(dropout_folder, batches)
    assert same(first, fit(dropout_folder, batches, noise=99))
    assert not same(first, fit(dropout_folder, batches, seed=2))
    assert not same(first, fit(dropout_folder, batches, dropout=0.0))


def test_training_loss_of_single_steps_goes_to_the_logger(folder: str, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    for every in (2, 0):
        trainer = quiet_trainer(logger=logger, log_every_n_steps=every, limit_val_batches=0)
        trainer.fit(BGEClassifier(folder), datamodule=Batches(BINARY, learnable()))
        assert ("train_loss_step" in trainer.callback_metrics) == bool(every)


# ------------------------------------------------------------------ mistakes


def test_labels_must_be_known(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"does not know its labels: .*call `module\.set_schema"):
        quiet_trainer().fit(BGEClassifier(folder), Loader(learnable()), Loader(learnable()))


def test_data_must_be_for_the_same_task(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"task is regression, but the data are for a binary task"):
        quiet_trainer().fit(BGEClassifier(folder, "regression"), datamodule=Batches(BINARY, learnable(), learnable()))


def test_threshold_of_an_own_schema_is_kept(folder: str) -> None:
    module = BGEClassifier(folder)
    module.set_schema(replace(BINARY, threshold=0.3))
    quiet_trainer().validate(module, datamodule=Batches(BINARY, val=learnable()), verbose=False)
    assert module.schema.threshold == 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "ranking"}, r"task must be one of binary, .*, got 'ranking'"),
        ({"dropout": 1.0}, r"dropout must be from 0 to below 1, or null, got 1\.0"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"attention": "sdpa"}, "attention must be one of auto, packed, padded, got 'sdpa'"),
        ({"frozen_layers": -1}, "frozen_layers must be 0 or more, or null, got -1"),
        (
            {"frozen_layers": 0, "lora": {"r": 4}},
            r"lora\.r=4, .* frozen_layers=0 exclude each other: set one of them to null",
        ),
        ({"lora": {"rank": 4}}, "lora has no key rank; its keys are r, alpha, target_modules"),
        ({"loss": "focal"}, "loss must be a LossConfig or a dict of its fields, got 'focal'"),
        ({"optimizer": {"lr": -1.0}}, r"optimizer\.lr: expected more than 0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BGEClassifier(**options)


def test_half_precision_weights_are_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"16-mixed, 32-true or auto, got bf16-true: .* Set bf16-mixed"):
        quiet_trainer(precision="bf16-true").fit(
            BGEClassifier(folder), datamodule=Batches(BINARY, learnable(), learnable())
        )


def test_bf16_autocast_keeps_fp32_weights(folder: str) -> None:
    module = BGEClassifier(folder, optimizer=FAST)
    trainer = quiet_trainer(precision="bf16-mixed")
    trainer.fit(module, datamodule=Batches(BINARY, learnable(), learnable()))
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    logits = module.predictions.logits
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())  # the head is computed in fp32
    assert torch.isfinite(trainer.callback_metrics["val_loss"])


def test_a_precision_that_does_not_work_is_refused(folder: str) -> None:
    module = BGEClassifier(folder, optimizer=FAST)
    with pytest.raises(ConfigError, match="expected bf16-mixed, 16-mixed, 32-true or auto, got 64-true"):
        quiet_trainer(precision="64-true").fit(module, datamodule=Batches(BINARY, learnable(), learnable()))


def test_more_tokens_than_positions_are_refused(folder: str) -> None:
    module = BGEClassifier(folder, optimizer=FAST)
    schema = replace(BINARY, max_length=100_000)
    with pytest.raises(ConfigError, match=r"has positions for \d+ tokens"):
        quiet_trainer().fit(module, datamodule=Batches(schema, learnable(), learnable()))


def test_a_run_without_an_end_is_refused(folder: str) -> None:
    module = BGEClassifier(folder, optimizer=FAST)
    with pytest.raises(ConfigError, match="a schedule needs to know its length"):
        quiet_trainer(max_epochs=-1).fit(module, datamodule=Batches(BINARY, learnable(), learnable()))
