"""Optimizers and schedules by the path of their class, against torch's own, made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from lightning_bge.errors import ConfigError
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    change_detector,
    materialize_state,
)
from lightning_bge.models.tried_classes import ThreeLayers, try_classes
from lightning_bge.types import Schema
from tests.helpers.own_classes import SignDescent, Triangle
from tests.helpers.rates import rates_of
from tests.helpers.small_models import Batches, cut_batch, quiet_trainer, random_sequences, save_model, small_model

OWN = "tests.helpers.own_classes"
TORCH = "torch.optim"
RATES = "torch.optim.lr_scheduler"
SCHEMA = Schema("binary", ("no", "yes"), ("text",), 32)
STEPS = 4  # of an epoch


def config(path: str, **init_args: Any) -> OptimizerConfig:
    return OptimizerConfig(class_path=path, init_args=init_args)


def schedule(path: str, **init_args: Any) -> ScheduleConfig:
    return ScheduleConfig(class_path=path, init_args=init_args)


# ---------------------------------------------------------------------- parameter groups


def test_norms_and_biases_do_not_decay_and_layers_have_their_rates() -> None:
    model = ThreeLayers()
    options = OptimizerConfig(
        class_path=f"{TORCH}.SGD", init_args={"lr": 1.0, "weight_decay": 0.1, "momentum": 0.9}, layer_decay=0.5
    )
    optimizer = build_optimizer(model, options)
    assert type(optimizer) is SGD
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    above = {"classifier": 0, "encoder.layer.1": 1, "encoder.layer.0": 2, "embeddings": 3}
    assert found == {
        f"{layer}.{kind}": (0.5**count, 0.1 if kind == "weight" else 0.0)
        for layer, count in above.items()
        for kind in ("weight", "bias")
    }
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}


def test_the_class_has_its_own_default_of_the_decay_or_none() -> None:
    optimizer = build_optimizer(ThreeLayers(), config(f"{TORCH}.AdamW", lr=1))
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.01, 0.0}
    optimizer = build_optimizer(ThreeLayers(), config(f"{OWN}.SignDescent", lr=1))
    assert isinstance(optimizer, SignDescent)
    assert [sorted(group) for group in optimizer.param_groups] == [["lr", "params"]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"class_path": f"{TORCH}.NoSuch"}, r"model\.optimizer\.class_path: expected the path of a class"),
        ({"class_path": "torch.nn.Linear"}, r"inherits from torch\.optim\.Optimizer, got torch\.nn\.Linear"),
        (
            {"class_path": f"{TORCH}.SGD"},
            r"init_args\.lr: expected the learning rate of torch\.optim\.SGD",
        ),
        ({"class_path": f"{TORCH}.SGD", "init_args": {"lr": -1}}, "does not accept .*Invalid learning rate"),
        ({"class_path": f"{TORCH}.SGD", "init_args": {"lr": 1, "colour": 2}}, "does not accept .*colour"),
        ({"class_path": f"{TORCH}.SGD", "init_args": {"lr": 1}, "lr": 1.0}, r"model\.optimizer\.lr: has no effect"),
        ({"class_path": f"{TORCH}.SGD", "init_args": {"lr": 1}, "beta1": 0.5}, "expected its default, 0.9, got 0.5"),
        ({"init_args": {"lr": 1}}, r"expected nothing without model\.optimizer\.class_path"),
        ({"class_path": f"{TORCH}.LBFGS", "init_args": {"lr": 1}}, "doesn't support|does not accept|closure"),
        ({"class_path": f"{TORCH}.SparseAdam", "init_args": {"lr": 1}}, "can't step over a matrix and a vector"),
        ({"class_path": f"{TORCH}.SGD", "init_args": {"lr": 1, "momentum": 1e30}}, "diverges"),
    ],
)
def test_optimizers_that_can_not_serve(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        try_classes(ThreeLayers(), OptimizerConfig(**options), ScheduleConfig(), total_steps=9, steps=9)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"class_path": f"{RATES}.NoSuch"}, r"model\.schedule\.class_path: expected the path of a class"),
        ({"class_path": f"{TORCH}.SGD"}, r"inherits from torch\.optim\.lr_scheduler\.LRScheduler"),
        ({"class_path": f"{RATES}.ReduceLROnPlateau"}, "needs the value of a metric"),
        ({"class_path": f"{RATES}.StepLR"}, "does not accept {}: .*step_size"),
        ({"class_path": f"{RATES}.OneCycleLR", "init_args": {"total_steps": 5}}, "can't be stepped 9 times"),
        ({"class_path": f"{RATES}.StepLR", "init_args": {"step_size": 1, "gamma": -1.0}}, "sets a learning rate of -"),
        ({"class_path": f"{RATES}.OneCycleLR", "init_args": {"max_lr": 0.1}}, "layer_decay"),
        ({"class_path": f"{RATES}.StepLR", "warmup": 3}, r"model\.schedule\.warmup: has no effect beside"),
    ],
)
def test_schedules_that_can_not_serve(options: dict[str, Any], expected: str) -> None:
    optimizer = OptimizerConfig(lr=0.1, layer_decay=0.5)
    with pytest.raises(ConfigError, match=expected) as caught:
        try_classes(ThreeLayers(), optimizer, ScheduleConfig(**options), total_steps=9, steps=9)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- what a failed step has changed


def stepped(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (SGD, {}),
    (SGD, {"momentum": 0.9}),
    (SGD, {"foreach": True}),
    (RMSprop, {}),
    (AdamW, {"foreach": False}),
    (AdamW, {"fused": True}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_a_step_is_noticed_and_nothing_else_is(kind: Any, options: dict[str, Any]) -> None:
    optimizer = kind([nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))], lr=0.1, **options)
    materialize_state(optimizer)
    for steps in range(3):
        changed = change_detector(optimizer, steps)
        assert not changed()
        stepped(optimizer)
        assert changed()


class Fails(RuntimeError):
    pass


def test_a_step_that_ends_in_its_middle_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    optimizer = SGD(parameters, lr=0.1, foreach=False)
    changed = change_detector(optimizer, 0)
    parameters[1].grad = torch.ones(3)
    parameters[0].grad = torch.ones(3)
    original = torch.Tensor.add_

    def add_(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        if tensor is parameters[1]:
            raise Fails
        return original(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "add_", add_)
    with pytest.raises(Fails):
        optimizer.step()
    assert changed()


def test_where_nothing_is_known_a_step_is_not_repeated() -> None:
    """Kernels of others may count no versions, and torch's fused one of SGD counts neither versions nor steps."""
    parameters = [nn.Parameter(torch.ones(3))]
    assert change_detector(SignDescent(parameters, lr=0.1), 0)()
    assert change_detector(SGD(parameters, lr=0.1, fused=True), 0)()


# ---------------------------------------------------------------------- whole runs


class Rates(Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


class SaveFirstEpoch(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


def run(
    folder: str, optimizer: Any, schedule: Any, *callbacks: Callback, checkpoint: Path | None = None, epochs: int = 2
) -> BGEClassifier:
    labels = torch.tensor([0.0, 1.0, 1.0])
    batches = [cut_batch(random_sequences((9, 7, 5), 45, seed), labels, 2) for seed in range(STEPS)]
    module = BGEClassifier(folder, optimizer=optimizer, schedule=schedule)
    trainer = quiet_trainer(max_epochs=epochs, limit_val_batches=0, callbacks=list(callbacks))
    trainer.fit(module, datamodule=Batches(SCHEMA, batches), ckpt_path=checkpoint, weights_only=True)
    return module


def expected(make: Any, steps: int = 2 * STEPS) -> list[float]:
    optimizer = AdamW([nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler: LRScheduler = make(optimizer)
    return rates_of(optimizer, scheduler, steps)


@pytest.mark.parametrize(
    ("path", "init_args", "make"),
    [
        (f"{RATES}.OneCycleLR", {}, lambda one: OneCycleLR(one, 0.01, total_steps=8)),
        (f"{RATES}.OneCycleLR", {"max_lr": 0.5}, lambda one: OneCycleLR(one, 0.5, total_steps=8)),
        (f"{RATES}.OneCycleLR", {"epochs": 3, "steps_per_epoch": 4}, lambda one: OneCycleLR(one, 0.01, total_steps=12)),
        (f"{RATES}.CosineAnnealingLR", {"eta_min": 1e-3}, lambda one: CosineAnnealingLR(one, 8, eta_min=1e-3)),
        (f"{RATES}.CosineAnnealingLR", {"T_max": 5}, lambda one: CosineAnnealingLR(one, 5)),
        (f"{OWN}.Triangle", {}, lambda one: Triangle(one, 8)),
    ],
)
def test_schedules_know_the_steps_of_the_run(folder: str, path: str, init_args: dict[str, Any], make: Any) -> None:
    rates = Rates()
    run(folder, {"lr": 0.01}, schedule(path, **init_args), rates)
    assert rates.rates == pytest.approx(expected(make))


def test_a_schedule_can_be_laid_out_for_a_longer_run(folder: str) -> None:
    rates = Rates()
    options = ScheduleConfig(class_path=f"{RATES}.CosineAnnealingLR", epochs=5)
    run(folder, {"lr": 0.01}, options, rates)
    assert rates.rates == pytest.approx(expected(lambda one: CosineAnnealingLR(one, 5 * STEPS)))


def test_a_run_is_that_of_plain_torch(folder: str) -> None:
    """AdamW by its class goes the way of the one by its name."""
    by_class = run(folder, {"class_path": f"{TORCH}.AdamW", "init_args": {"lr": 0.01, "fused": True}}, {})
    by_name = run(folder, {"lr": 0.01}, {})
    assert all(map(torch.equal, by_class.parameters(), by_name.parameters()))


@pytest.mark.parametrize(
    "optimizer",
    [
        config(f"{TORCH}.SGD", lr=0.1, momentum=0.9),
        config(f"{OWN}.SignDescent", lr=0.01),
        config(f"{TORCH}.AdamW", lr=0.01, fused=True, amsgrad=True),
    ],
    ids=["sgd", "own", "amsgrad"],
)
def test_a_run_is_resumed(folder: str, tmp_path: Path, optimizer: OptimizerConfig) -> None:
    path, cycle = tmp_path / "first.ckpt", schedule(f"{RATES}.CosineAnnealingLR")
    whole = run(folder, optimizer, cycle, SaveFirstEpoch(path))
    resumed = run(folder, optimizer, cycle, checkpoint=path)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    loaded = BGEClassifier.load_from_checkpoint(path)
    assert (loaded.optimizer_config, loaded.schedule_config) == (optimizer, cycle)


def test_a_schedule_of_another_length_is_not_resumed(folder: str, tmp_path: Path) -> None:
    path, cycle = tmp_path / "first.ckpt", schedule(f"{RATES}.CosineAnnealingLR")
    run(folder, {}, cycle, SaveFirstEpoch(path))
    with pytest.raises(ConfigError, match=r"checkpoint's schedule has T_max=8, and this run 12 optimizer steps"):
        run(folder, {}, cycle, checkpoint=path, epochs=3)


def test_nothing_is_imported_that_a_checkpoint_names(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "first.ckpt"
    run(folder, {}, {}, SaveFirstEpoch(path))
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["optimizer"] |= {"class_path": "foreign_code.Optimizer", "init_args": {"lr": 1}}
    torch.save(content, path)
    (tmp_path / "foreign_code.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = BGEClassifier.load_from_checkpoint(path)
    batch = cut_batch(random_sequences((9, 7), 45), torch.tensor([0.0, 1.0]), 1)
    with pytest.raises(ConfigError, match=r"foreign_code\.Optimizer comes from a checkpoint"):
        quiet_trainer(max_epochs=1, limit_val_batches=0).fit(loaded, datamodule=Batches(SCHEMA, [batch]))


def test_clipping_stays(folder: str) -> None:
    optimizer = {"class_path": f"{TORCH}.SGD", "init_args": {"lr": 1.0}, "max_grad_norm": 1e-3}
    before = BGEClassifier(folder)
    before.set_schema(SCHEMA)
    before.configure_model()
    after = run(folder, optimizer, {"name": "constant", "warmup": 0}, epochs=1)
    pairs = zip(after.parameters(), before.parameters(), strict=True)
    moved = sum(float((a - b).detach().norm() ** 2) for a, b in pairs) ** 0.5
    assert 0 < moved <= STEPS * 1e-3 * 1.01


def test_frozen_parameters_are_left_out() -> None:
    model = small_model("bert")
    model.bert.embeddings.requires_grad_(False)
    held = [p for g in build_optimizer(model, config(f"{TORCH}.SGD", lr=1)).param_groups for p in g["params"]]
    assert set(map(id, held)) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
