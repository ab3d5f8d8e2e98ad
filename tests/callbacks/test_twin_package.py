"""Trainers and modules of the package `pytorch_lightning`, which has classes of its own for the same library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bge.callbacks import (
    CompileConfig,
    CompileLayers,
    MemoryConfig,
    MicroBatchFinder,
    OOMHandler,
    Throughput,
    ThroughputProgressBar,
    TorchBackends,
    TrainMode,
)
from lightning_bge.callbacks.micro_batch import cache as cache_module
from lightning_bge.callbacks.micro_batch import finder as finder_module
from lightning_bge.callbacks.micro_batch import probe as probe_module
from lightning_bge.errors import ConfigError
from lightning_bge.runtime.compat.lightning import is_strategy
from lightning_bge.runtime.memory import Limit
from tests.callbacks.test_every_callback import CALLBACKS

twin: Any = pytest.importorskip("pytorch_lightning", reason="newer versions of lightning bring it")
OFF = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found . module.* in eval mode"),
]


@pytest.fixture(autouse=True)
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LIGHTNING_BGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lightning_bge.callbacks.compile.callback._findings", {})
    cache_module.forget()
    yield
    cache_module.forget()


class Plain(twin.LightningModule):  # type: ignore[misc]
    """A module as anybody writes it."""

    def __init__(self, batch_size: int = 4, largest: int = 100) -> None:
        super().__init__()
        self.batch_size, self.largest = batch_size, largest
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.0)) for _ in range(2))
        self.head = nn.Linear(6, 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        values = batch["input_ids"]
        if len(values) > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        for layer in self.layers:
            values = layer(values)
        return self.head(values).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(14, 6, generator=generator)
        samples: Any = [{"input_ids": row, "attention_mask": torch.ones(6)} for row in rows]
        return DataLoader(samples, batch_size=self.batch_size)

    val_dataloader = train_dataloader


def fit(module: Any, *callbacks: Callback, **options: Any) -> Any:
    trainer = twin.Trainer(**{**OFF, "max_epochs": 2, "accelerator": "cpu", "callbacks": list(callbacks), **options})
    trainer.fit(module)
    return trainer


@pytest.mark.parametrize("callback", [one for one in CALLBACKS if one is not ThroughputProgressBar])
def test_every_callback_lets_the_module_train_as_without_it(callback: type[Callback]) -> None:
    expected, module = Plain(), Plain()
    module.load_state_dict(expected.state_dict())
    fit(expected)
    fit(module, callback())
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, msg=name)


def test_the_finder_searches_and_the_handler_lowers_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finder_module, "limits", lambda *_: [Limit("RLIMIT_AS", 10**12, 0, raises=True)])
    config = MemoryConfig(min_speedup=None, safety_margin=0.0)
    finder, module = MicroBatchFinder(config), Plain(batch_size=12, largest=4)
    seen: list[Any] = []

    class Sizes(twin.Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append((len(batch["input_ids"]), trainer.accumulate_grad_batches))

    trainer = fit(module, finder, Sizes())
    assert (finder.micro_batch_size, seen[:4]) == (4, [(4, 3), (4, 3), (4, 3), (2, 3)])
    assert trainer.global_step == 4
    assert (module.batch_size, trainer.accumulate_grad_batches) == (12, 1)

    class Grows(twin.Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.largest = 3

    handler = OOMHandler()
    with pytest.raises(torch.OutOfMemoryError):
        fit(Plain(batch_size=12, largest=4), finder, handler, Grows())
    assert handler.records[0].where == "forward"
    assert finder.micro_batch_size == 2


@pytest.mark.parametrize("name", ["SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "DeepSpeedStrategy"])
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_strategies_are_recognised_in_both_packages(package: str, name: str) -> None:
    module = pytest.importorskip(f"{package}.strategies")
    strategy = object.__new__(getattr(module, name))
    steps_alone = name in ("SingleDeviceStrategy", "DDPStrategy")
    assert is_strategy(strategy, "SingleDeviceStrategy", "DDPStrategy") is steps_alone
    if not steps_alone:
        trainer: Any = type("T", (), {"strategy": strategy})()
        assert probe_module.make_meter(trainer, torch.device("cpu")) == f"a step can't be tried alone under {name}"


def test_figures_are_logged_modes_switched_and_layers_compiled() -> None:
    module, compiled = Plain(), CompileLayers(CompileConfig(policy="always", backend="eager"))
    module.layers.eval()
    mode, backends = TrainMode(), TorchBackends()
    trainer = fit(module, mode, backends, Throughput(), compiled)
    assert trainer.callback_metrics["train_tokens_per_s"] > 0
    assert len(mode.switched) == 7
    assert compiled.in_effect
    assert backends.report


def test_a_measurement_decides_on_compiling() -> None:
    compiled = CompileLayers(CompileConfig(backend="eager"), steps_left=10**6)
    fit(Plain(batch_size=1), compiled, max_epochs=2)
    assert compiled.found.measured is not None or compiled.found.failed is not None, compiled.reason
    assert compiled.reason.startswith("compile o")


def test_the_progress_bar_says_which_trainer_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"expected a Trainer of lightning\.pytorch, got one of pytorch_lightning"):
        fit(Plain(), ThroughputProgressBar())
