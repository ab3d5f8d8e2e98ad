"""The optimizer's state: made before the first step, and in 8 bits."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bge.errors import ConfigError
from lightning_bge.models import optimizer as optim
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.optimizer import OptimizerConfig, build_optimizer, materialize_state
from lightning_bge.types import Schema
from tests.helpers.small_models import Batches, cut_batch, quiet_trainer, random_sequences, save_model, small_model

needs_8bit = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
CONFIG = OptimizerConfig(lr=1e-2)


def make_model() -> nn.Module:
    """With a parameter of another memory format, one without a gradient, and a big one."""
    model = nn.ParameterDict({"wide": torch.randn(64, 96), "bias": torch.randn(7), "one": torch.randn(())})
    model["image"] = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    model["unused"] = torch.randn(3)
    return model


def step(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.items():
        if name != "unused":
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
    optimizer.step()
    optimizer.zero_grad()


def everything(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    held = [parameter.detach() for parameter in model.values()]
    for name, parameter in model.items():
        if name != "unused":
            held += [torch.as_tensor(value) for value in optimizer.state[parameter].values()]
    return held


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    pairs = list(zip(left, right, strict=True))
    return all(a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b) for a, b in pairs)


def test_first_steps_are_the_same_and_make_no_state() -> None:
    plain = make_model()
    model = copy.deepcopy(plain)
    optimizer = build_optimizer(model, CONFIG)
    materialize_state(optimizer)
    assert same(everything(model, optimizer)[:5], everything(plain, build_optimizer(plain, CONFIG)))
    places = [value.data_ptr() for state in optimizer.state.values() for value in state.values()]
    reference = build_optimizer(plain, CONFIG)
    for seed in range(3):
        step(model, optimizer, seed)
        step(plain, reference, seed)
        assert same(everything(model, optimizer), everything(plain, reference))
    assert [value.data_ptr() for state in optimizer.state.values() for value in state.values()] == places


def test_frozen_parameters_get_no_state() -> None:
    model = small_model("bert")
    model.bert.embeddings.requires_grad_(False)
    optimizer = build_optimizer(model, CONFIG)
    materialize_state(optimizer)
    assert set(optimizer.state) == {parameter for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("before", [False, True])
def test_a_loaded_state_is_kept(before: bool) -> None:
    """The checkpoint has none for `unused`: torch had nothing to make it for."""
    plain = make_model()
    reference = build_optimizer(plain, CONFIG)
    step(plain, reference, 0)
    model = copy.deepcopy(plain)
    optimizer = build_optimizer(model, CONFIG)
    if before:
        materialize_state(optimizer)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    materialize_state(optimizer)
    assert same(everything(model, optimizer), everything(plain, reference))
    assert not optimizer.state[model["unused"]]["exp_avg"].any()
    step(model, optimizer, 1)
    step(plain, reference, 1)
    assert same(everything(model, optimizer), everything(plain, reference))


# ------------------------------------------------------------------ 8 bits


def test_no_library_for_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bitsandbytes is not installed: pip install 'lightning-bge\[lowbit\]'"):
        OptimizerConfig(name="adamw_8bit")
    with pytest.raises(ConfigError, match=r"optimizer.name: expected one of adamw, adamw_8bit, got sgd"):
        OptimizerConfig(name="sgd")  # type: ignore[arg-type]


@needs_8bit
def test_8_bits_go_nearly_the_same_way() -> None:
    start = nn.ParameterDict({"weight": torch.randn(256, 128), "bias": torch.randn(128)})
    found: dict[str, dict[str, Tensor]] = {}
    sizes: dict[str, int] = {}
    for name in ("adamw", "adamw_8bit"):
        model = copy.deepcopy(start)
        config = OptimizerConfig(name, lr=1e-3, weight_decay=0.1, beta1=0.8, beta2=0.95)  # type: ignore[arg-type]
        optimizer = build_optimizer(model, config)
        assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1]
        assert all(tuple(group["betas"]) == (0.8, 0.95) for group in optimizer.param_groups)
        materialize_state(optimizer)
        for seed in range(5):
            step(model, optimizer, seed)
        found[name] = {key: (model[key] - start[key]).detach() for key in start}
        sizes[name] = sum(
            part.nbytes for state in optimizer.state.values() for part in state.values() if torch.is_tensor(part)
        )
    # the bias, of fewer than 4096 numbers, is kept in 32 bits
    torch.testing.assert_close(found["adamw_8bit"]["bias"], found["adamw"]["bias"], rtol=1e-4, atol=1e-6)
    ours, exact = found["adamw_8bit"]["weight"], found["adamw"]["weight"]
    assert float((ours - exact).norm() / exact.norm()) < 0.05
    assert sizes["adamw_8bit"] < 0.3 * sizes["adamw"]


@needs_8bit
def test_state_that_was_made_in_8_bits_is_what_the_first_step_makes() -> None:
    plain = make_model()
    model = copy.deepcopy(plain)
    config = OptimizerConfig("adamw_8bit", lr=1e-2)
    optimizer, reference = build_optimizer(model, config), build_optimizer(plain, config)
    materialize_state(optimizer)
    for seed in range(2):
        step(model, optimizer, seed)
        step(plain, reference, seed)
        assert same(everything(model, optimizer), everything(plain, reference))


class SaveFirstEpoch(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@needs_8bit
def test_run_in_8_bits_is_resumed(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "start", hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    labels = torch.tensor([0.0, 1.0, 1.0])
    batches = [cut_batch(random_sequences((9, 7, 5), 45, seed), labels, 2) for seed in range(2)]

    def run(checkpoint: Path | None = None) -> dict[str, Tensor]:
        module = BGEClassifier(folder, optimizer=OptimizerConfig("adamw_8bit", lr=1e-2))
        callbacks = [] if checkpoint else [SaveFirstEpoch(tmp_path / "first.ckpt")]
        trainer = quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=callbacks)
        data = Batches(Schema("binary", ("no", "yes"), ("text",), 16), batches)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        assert float(trainer.optimizers[0].param_groups[0]["lr"]) == 0  # the schedule's end
        return module.net.state_dict()

    whole = run()
    resumed = run(tmp_path / "first.ckpt")
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
