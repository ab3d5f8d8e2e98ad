"""What every exported callback promises: it works by default, in a project that uses nothing else of this package."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pkgutil import walk_packages
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor, nn

import lightning_bge.callbacks as package
from tests.helpers.small_models import Loader, quiet_trainer

EXPORTED = [getattr(package, name) for name in package.__all__]
CALLBACKS = [each for each in EXPORTED if isinstance(each, type) and issubclass(each, Callback)]


def batches() -> list[dict[str, Tensor]]:
    """Three batches as a tokenizer of transformers makes them: padded, with a mask."""
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[1:, 4:] = 0
    return [{"input_ids": torch.ones(4, 6), "attention_mask": mask}] * 3


class Plain(LightningModule):
    """A module as anybody writes it; one step fails where that is asked for."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head, self.error = nn.Linear(6, 1), error

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.error is not None and batch_idx == 1:
            raise self.error
        values = batch["input_ids"]
        for layer in self.layers:
            values = layer(values)
        return self.head(values).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(module: LightningModule, callback: Callback, **options: Any) -> None:
    bar = {"enable_progress_bar": isinstance(callback, ProgressBar)}
    trainer = quiet_trainer(callbacks=[callback], **bar, **options)
    trainer.fit(module, Loader(batches()), Loader(batches()))
    assert trainer.global_step == 3 * trainer.max_epochs


def test_all_callbacks_are_exported() -> None:
    modules = [importlib.import_module(part.name) for part in walk_packages(package.__path__, f"{package.__name__}.")]
    defined = {
        each
        for module in modules
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Callback) and each.__module__ == module.__name__
    }
    assert {each for each in defined if not each.__name__.startswith("_")} == set(CALLBACKS)
    assert len(CALLBACKS) > 5


@pytest.mark.parametrize("callback", CALLBACKS)
def test_it_has_a_docstring_and_needs_no_argument(callback: type[Callback]) -> None:
    assert callback.__doc__
    assert isinstance(callback(), Callback)


@pytest.mark.parametrize("callback", CALLBACKS)
def test_it_survives_several_runs_and_the_module_trains_as_without_it(callback: type[Callback]) -> None:
    torch.manual_seed(0)
    expected, module = Plain(), Plain()
    module.load_state_dict(expected.state_dict())
    first = {name: value.clone() for name, value in module.state_dict().items()}
    instance = callback()
    for _ in range(2):
        train(expected, Callback(), max_epochs=2, num_sanity_val_steps=1)
        train(module, instance, max_epochs=2, num_sanity_val_steps=1)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, msg=name)
    assert not torch.equal(module.state_dict()["head.bias"], first["head.bias"])
    train(Plain(), instance)  # another module


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), MemoryError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("callback", CALLBACKS)
def test_an_error_ends_the_run_unchanged_and_the_next_run_works(callback: type[Callback], error: BaseException) -> None:
    instance = callback()
    expected = SystemExit if isinstance(error, KeyboardInterrupt) else type(error)  # as Lightning has it
    with pytest.raises(expected) as caught:
        train(Plain(error), instance)
    assert error in (caught.value, caught.value.__context__)
    train(Plain(), instance)


def test_callbacks_import_nothing_of_this_package_but_what_lies_below() -> None:
    code = (
        f"import sys; from lightning_bge.callbacks import {', '.join(package.__all__)}\n"
        "print(*{name.split('.')[1] for name in sys.modules if name.startswith('lightning_bge.')})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"callbacks", "runtime", "errors", "types", "tokenization"}
