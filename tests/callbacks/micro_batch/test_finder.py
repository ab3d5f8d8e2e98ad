"""The search for a batch size, in a project that knows nothing of ours; and our own module, undisturbed by it."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lightning_bge.callbacks.micro_batch import cache as cache_module
from lightning_bge.callbacks.micro_batch import finder as finder_module
from lightning_bge.callbacks.micro_batch import probe as probe_module
from lightning_bge.callbacks.micro_batch.cache import FILE, FoundSize, MicroBatchSizes
from lightning_bge.callbacks.micro_batch.config import MemoryConfig
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.callbacks.micro_batch.probe import HostMeter
from lightning_bge.callbacks.micro_batch.search import Answer, FreeMemory, Search, TrialStep
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder import TextClassifier, load_classifier
from lightning_bge.models.optimizer import OptimizerConfig
from lightning_bge.runtime.memory import Limit, process_bytes, register_cache
from lightning_bge.types import MicroBatch
from tests.helpers.rank_processes import run_ranks
from tests.helpers.small_models import Loader, quiet_trainer, save_model

HELD, ROW = 300, 10  # bytes of a step: gradients and the like, and of each row

# ------------------------------------------------------------------ the search


class Machine:
    """Steps that take `HELD + ROW * units` bytes, of which a limit that raises sees `factor` times as many."""

    def __init__(self, free: FreeMemory, factor: float = 1.0, constant: float = 0.0, noise: float = 0.0) -> None:
        self.free, self.factor, self.constant, self.noise = free, factor, constant, noise
        self.random = random.Random(0)
        self.tried: list[int] = []

    def bytes(self, units: float) -> float:
        return HELD + ROW * units

    def __call__(self, units: int, validate: bool) -> TrialStep | None:
        self.tried.append(units)
        assert self.free.killing is None or self.bytes(units) <= self.free.killing, f"{units} units: killed"
        if self.free.raising is not None and self.bytes(units) * self.factor > self.free.raising:
            return None
        peak = self.bytes(units) + self.random.uniform(-self.noise, self.noise)
        return TrialStep(units, round(peak), (self.constant + 0.1 * units) / 1000)

    def search(self, margin: float = 0.1, min_speedup: float | None = None, enough: int = 16) -> tuple[Answer, Search]:
        search = Search(self, lambda: self.free, margin, min_speedup, enough, step=4, noise=round(2 * self.noise))
        return search.run(), search


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.0, 1.1, 1.7, 3.0])
@pytest.mark.parametrize("free", [1_000, 7_777, 123_456, 10_000_000])
def test_what_raises_is_tried_up_to_the_limit_and_the_margin_is_left(free: int, factor: float) -> None:
    machine = Machine(FreeMemory(free, None), factor)
    answer, search = machine.search()
    most = (free / factor - HELD) / ROW
    assert answer.units <= 0.9 * most + 1
    if most > 20:
        assert answer.units >= 0.9 * most / 1.05 - 1
        assert machine.bytes(1.35 * answer.units) * factor > free
    assert answer.units in [units for units, peak, _ in search.tried if peak is not None]
    assert len(machine.tried) <= 6 + math.log(most + 2, 8) + (12 if factor != 1 else 0)
    assert "are left free" in answer.reason


@pytest.mark.parametrize(("noise", "free"), [(0, 900), (9, 900), (0, 7_777), (50, 7_777), (HELD, 10**5), (HELD, 10**7)])
def test_beyond_a_limit_that_kills_nothing_is_tried(free: int, noise: float) -> None:
    machine = Machine(FreeMemory(None, free), noise=noise)
    answer, search = machine.search()
    most = (free - HELD) / ROW
    assert max(machine.tried) <= 0.95 * most  # and `Machine` makes sure of it
    assert 0.8 * most - 1 <= answer.units <= 0.92 * most
    assert search.peak(answer.units) <= free
    assert answer.reason == "as much as the limit is predicted to allow, less 10% of the activations"


def test_of_two_limits_the_tighter_one_counts() -> None:
    assert Machine(FreeMemory(10_000, 5_000)).search()[0].units == pytest.approx(0.9 * 470, rel=0.01)
    assert Machine(FreeMemory(5_000, 10_000)).search()[0].units == pytest.approx(0.9 * 470, rel=0.05)


@pytest.mark.parametrize(("free", "units"), [(305, 0), (315, 1), (321, 2), (400, 10)])
def test_little_memory(free: int, units: int) -> None:
    assert Machine(FreeMemory(free, None)).search(margin=0.0)[0].units == units
    reason = Machine(FreeMemory(free, None)).search(margin=0.5, min_speedup=0.05)[0].reason
    assert reason == "not even 4 fits" if units == 0 else "fitted" in reason


def test_one_unit_may_be_beyond_a_limit_that_kills() -> None:
    machine = Machine(FreeMemory(None, 299))
    machine.bytes = lambda units: 250.0  # type: ignore[method-assign]
    assert machine.search()[0].units >= 1
    search = Search(lambda units, _: TrialStep(units, 400, 1.0), lambda: FreeMemory(None, 300), 0.1, None, 1)
    assert search.run() == Answer(0, "not even 1 fits")


def test_room_that_steps_take_away_is_counted() -> None:
    """As by a library that keeps something for each shape it has seen."""
    left = [10_000]

    def attempt(units: int, validate: bool) -> TrialStep:
        peak = HELD + ROW * units
        assert peak <= left[0]
        left[0] -= 100
        return TrialStep(units, peak, 1.0)

    answer = Search(attempt, lambda: FreeMemory(None, left[0]), 0.1, None, 1).run()
    assert 0.75 * (left[0] - HELD) / ROW <= answer.units <= 0.9 * (left[0] + 100 - HELD) / ROW


def gain(units: int, constant: float) -> float:
    return 2 * (constant + 0.1 * units / 2) / (constant + 0.1 * units) - 1


@pytest.mark.parametrize("constant", [0.0, 0.5, 3.0, 20.0])
@pytest.mark.parametrize("free", [FreeMemory(None, None), FreeMemory(10**7, None), FreeMemory(None, 10**7)])
def test_growth_ends_where_speed_does(free: FreeMemory, constant: float) -> None:
    machine = Machine(free, constant=constant)
    answer, _ = machine.search(min_speedup=0.05)
    if answer.units > 16:
        assert gain(answer.units, constant) >= 0.05
    assert gain(2 * answer.units, constant) < 0.05 or gain(answer.units, constant) < 0.05
    assert answer.reason.endswith("units a second over half of it")
    assert machine.tried[:3] == [1, 2, 8]  # half of enough is the first that is timed
    assert all(machine.tried.count(units) == 2 for units in machine.tried[3:])


def test_memory_may_end_growth_before_speed_does() -> None:
    for free in (FreeMemory(1_500, None), FreeMemory(None, 1_500)):
        machine = Machine(free, constant=100.0)
        answer, _ = machine.search(min_speedup=0.05)
        assert answer.units == pytest.approx(0.9 * 120, rel=0.05)
    tiny = Machine(FreeMemory(400, None), constant=100.0).search(min_speedup=0.05)[0]
    assert tiny.units == 9  # less than enough


def test_a_size_that_fits_only_once_is_given_up() -> None:
    machine = Machine(FreeMemory(10**7, None), constant=100.0)

    def moody(units: int, validate: bool) -> TrialStep | None:
        return None if units > 30 and not validate else machine(units, validate)

    answer = Search(moody, lambda: machine.free, 0.1, 0.05, 16).run()
    assert 16 <= answer.units < 32


def test_better_of_two_steps_is_timed() -> None:
    """The first step of a size is slow where something is compiled for it."""
    seen: set[int] = set()

    def attempt(units: int, validate: bool) -> TrialStep:
        first = units not in seen
        seen.add(units)
        return TrialStep(units, 100, scale * (1.0 + 0.1 * units + 1000 * first))

    scale = 1e-4
    assert Search(attempt, lambda: FreeMemory(None, None), 0.1, 0.05, 16).run().units == 128
    seen.clear()
    scale = 1.0  # a long step is made once
    assert Search(attempt, lambda: FreeMemory(None, None), 0.1, 0.05, 16).run().units > 128


def test_where_there_is_plenty_memory_is_not_looked_at() -> None:
    for free in (FreeMemory(10**4, None), FreeMemory(None, 10**4), FreeMemory(10**9, 10**4)):
        machine = Machine(free)
        assert Search(machine, lambda free=free: free, 0.1, 0.05, 16).run_if_plenty() is not None
        assert machine.tried == [1, 2, 8, 8, 16, 16]
        machine = Machine(free, constant=1000.0)  # more and more would pay
        assert Search(machine, lambda free=free: free, 0.1, 0.05, 16).run_if_plenty() is None
        assert machine.bytes(max(machine.tried)) <= 0.5 * 10**4
        assert Search(machine, lambda free=free: free, 0.1, None, 16).run_if_plenty() is None
    assert Search(Machine(FreeMemory(305, None)), lambda: FreeMemory(305, None), 0.1, 0.05, 16).run_if_plenty() is None


# ------------------------------------------------------------------ a foreign project


class Foreign(LightningModule):
    """A module as anybody writes it, with all that trial steps might disturb. Automatically optimised."""

    def __init__(self, optimizer: Callable[..., Any] | None = None, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.frozen = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)).eval().requires_grad_(False)
        self.head = nn.Linear(6, 1)
        self.losses: list[float] = []
        self.counts: dict[str, int] = {"steps": 0}
        self.mean = torch.zeros(())
        self.largest = 1940  # rows that fit: twice what of what `FakeMeter` allows for 10,000 bytes
        self.trying = False

    @contextmanager
    def trial_steps(self) -> Iterator[None]:
        self.trying = True
        yield
        self.trying = False

    def forward(self, values: Tensor) -> Tensor:
        if len(values) > self.largest:
            self.kept_by_error = torch.empty(100)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        noise = random.random() + float(np.random.random())
        return self.head(self.frozen(self.body(values))) + noise

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self(batch).square().mean()
        self.log("loss", loss)
        self.losses.append(loss.item())
        self.counts["steps"] += 1
        self.mean += loss.detach()
        self.lazy = len(batch)
        if self.automatic_optimization:
            return {"loss": loss}
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        self.manual_backward(loss)
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        scheduler.step()  # type: ignore[union-attr, call-arg]
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.log("val", self(batch).mean())

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        # refuses to be stepped beyond its end
        return [optimizer], [
            torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12, cycle_momentum=False)
        ]


class Rows(LightningDataModule):
    """A batch source of rows."""

    def __init__(self, step: int = 2, **attributes: Any) -> None:
        super().__init__()
        self.micro_batch_size_step, self.micro_batch_size, self.set, self.made = step, 4, [], []
        vars(self).update(attributes)

    def worst_case_batch(self, size: int, train: bool) -> Tensor:
        self.made.append(size)
        return torch.ones(size * (1 if train else 2), 6)

    def set_micro_batch_size(self, size: int) -> None:
        self.micro_batch_size = size
        self.set.append(size)

    def train_dataloader(self) -> Loader:
        generator = torch.Generator().manual_seed(1)
        return Loader([torch.randn(4, 6, generator=generator) for _ in range(6)])

    val_dataloader = train_dataloader


class FakeMeter:
    """Measures a clock and a memory that go by the batches that were asked for."""

    noise = 0

    def __init__(self, data: Rows) -> None:
        self.data, self.seconds = data, 0.0

    def start(self) -> None:
        pass

    def peak(self) -> int:
        return HELD + ROW * self.data.made[-1]

    def now(self) -> float:
        self.seconds += 0.1 * self.data.made[-1]
        return self.seconds


class SimpleCache:
    def __init__(self, capacity: int, nbytes: int) -> None:
        self.capacity, self.nbytes = capacity, nbytes

    def shrink(self) -> None:
        self.nbytes = 0


Use = Callable[..., None]


@pytest.fixture(autouse=True)
def forgetful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LIGHTNING_BGE_CACHE", str(tmp_path / "cache"))
    # slow; what stays held is tested below
    monkeypatch.setattr(probe_module, "live_bytes", lambda: 0)
    monkeypatch.setattr(probe_module, "release", lambda: None)
    monkeypatch.setattr(probe_module, "gc", SimpleNamespace(collect=lambda: 0, get_freeze_count=lambda: 1))
    monkeypatch.setattr("lightning_bge.runtime.memory._caches", WeakSet())
    cache_module.forget()
    yield
    cache_module.forget()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """A machine of so much memory; nothing is mapped in another way for the tests after this one."""

    def choose(data: Any, total: int | None, raises: bool = True) -> None:
        known = [] if total is None else [Limit("RLIMIT_AS", total, 0, raises=raises)]
        monkeypatch.setattr(finder_module, "limits", lambda *_: known)
        monkeypatch.setattr(finder_module, "make_meter", lambda *_, **__: FakeMeter(data))
        monkeypatch.setattr(finder_module, "map_large_blocks", lambda: None)

    return choose


def train(module: LightningModule, data: LightningDataModule, *callbacks: Callback, **options: Any) -> Trainer:
    trainer = quiet_trainer(callbacks=list(callbacks), **{"max_epochs": 2, "gradient_clip_val": 1.0, **options})
    trainer.fit(module, datamodule=data)
    return trainer


ALL = MemoryConfig(min_speedup=None)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found . module.* in eval mode"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`"),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
]


class Losses(Callback):
    """The losses and modes of the real steps."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        modes = [part.training for part in pl_module.modules()]
        loss = pl_module.losses[-1] if hasattr(pl_module, "losses") else pl_module._losses[-1].item()
        self.seen.append((trainer.global_step, loss, modes, torch.rand(1).item(), random.random(), np.random.rand()))


def everything(module: LightningModule, trainer: Trainer) -> dict[str, Any]:
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    return {
        "weights": module.state_dict(),
        "optimizers": optimizers,
        "schedulers": [{k: v for k, v in state.items() if not callable(v)} for state in schedulers],
        "steps": trainer.global_step,
        "loops": trainer.fit_loop.state_dict(),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "attributes": sorted(set(vars(module)) - {"_forward_hooks"}),
    }


def assert_same(some: Any, others: Any, at: str = "") -> None:
    assert type(some) is type(others), at
    if isinstance(some, Tensor):
        assert torch.equal(some, others), at
    elif isinstance(some, dict):
        assert list(some) == list(others), at
        for key in some:
            assert_same(some[key], others[key], f"{at}.{key}")
    elif isinstance(some, list | tuple):
        assert len(some) == len(others), at
        for number, (one, other) in enumerate(zip(some, others, strict=True)):
            assert_same(one, other, f"{at}[{number}]")
    elif not callable(some) and type(some).__module__ == "builtins":
        assert some == others, at


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),  # its state is there from the start
}


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_after_the_search_is_the_same_bit_for_bit(name: str, manual: bool, use: Use) -> None:
    found = []
    for finders in ([], [MicroBatchFinder(ALL)]):
        seed_everything(3)
        module, data, losses = Foreign(OPTIMIZERS[name], manual), Rows(), Losses()
        use(data, 10_000)
        clip = {"gradient_clip_val": None if manual else 1.0}
        trainer = train(module, data, *finders, losses, **clip)
        found.append((everything(module, trainer), losses.seen, module.losses, module.counts, module.mean))
        if finders:
            assert len(data.made) > 10  # it did search
            assert 0.9 * 970 / 1.05 - 2 < data.micro_batch_size <= 0.9 * 970
            assert finders[0].describe()["tried"][-1][0] == data.micro_batch_size
    assert_same(*found)


@pytest.mark.parametrize("where", ["training", "validation", "source"])
def test_an_error_comes_out_and_everything_is_put_back(where: str, use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[Any] = []

    class Before(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            states.append(everything(pl_module, trainer))
            states[-1]["modes"] = [part.training for part in pl_module.modules()]
            states[-1]["more"] = (list(pl_module.losses), dict(pl_module.counts), pl_module.mean.clone())
            states[-1]["weights"] = {k: v.clone() for k, v in pl_module.state_dict().items()}
            states[-1]["random"] = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[union-attr]

        def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
            self.on_train_start(trainer, pl_module)

    module, data, before = Foreign(), Rows(), Before()
    use(data, 10_000)

    def broken(*_: Any) -> Any:
        if len(data.made) < 9:
            return original(*_)
        raise RuntimeError("shape mismatch")

    owner, name = {
        "training": (module, "training_step"),
        "validation": (module, "validation_step"),
        "source": (data, "worst_case_batch"),
    }[where]
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        train(module, data, before, MicroBatchFinder(ALL))
    assert len(data.made) >= 8
    assert_same(*states)
    assert not module.trying
    assert all(parameter.grad is None for parameter in module.parameters())


def test_other_callbacks_and_loggers_see_nothing_of_it(use: Use) -> None:
    calls: list[str] = []

    class Watch(Callback):
        def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
            calls.append("backward")

        def on_before_zero_grad(self, *_: Any) -> None:
            calls.append("zero")

    class Talks(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trying:
                self.log("never", 1.0, on_step=True)
                self.logger.experiment.add_scalar("never", 1)  # type: ignore[union-attr]
            return super().training_step(batch, batch_idx)

    from lightning.pytorch.loggers import CSVLogger

    class Log(CSVLogger):
        def __init__(self) -> None:
            super().__init__("nowhere")
            self.names: set[str] = set()

        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:  # type: ignore[override]
            self.names |= set(metrics)

        def save(self) -> None:
            pass

        def log_hyperparams(self, *_: Any) -> None:  # type: ignore[override]
            pass

    data, logger = Rows(), Log()
    use(data, 10_000)
    trainer = train(Talks(), data, MicroBatchFinder(ALL), Watch(), logger=logger, log_every_n_steps=1)
    assert calls.count("backward") == 12
    assert "never" not in logger.names
    assert "val" in logger.names
    assert trainer.logger is logger


def test_the_optimizers_state_exists_in_trial_steps_and_gradients_do(use: Use) -> None:
    seen: list[tuple[int, int]] = []

    class Watched(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trying:
                [optimizer] = self.trainer.optimizers
                grads = sum(parameter.grad is not None for parameter in self.parameters())
                seen.append((len(optimizer.state), grads))
            return super().training_step(batch, batch_idx)

    data = Rows()
    use(data, 10_000)
    train(Watched(OPTIMIZERS["adamw"]), data, MicroBatchFinder(ALL))
    trainable = 6
    assert seen[:2] == [(0, 0), (trainable, 0)]
    assert set(seen[2:]) == {(trainable, trainable)}


def test_a_module_that_changes_its_weights_itself_is_put_back_too(use: Use) -> None:
    class Clamps(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trying:
                self.head.weight.data.mul_(0.5)  # no version counter sees it
                self.head.requires_grad_(False)
            return super().training_step(batch, batch_idx)

    weights = []

    class Start(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            weights.append(pl_module.head.weight.detach().clone())

    data, module = Rows(), Clamps()
    before = module.head.weight.detach().clone()
    use(data, 10_000)
    train(module, data, MicroBatchFinder(ALL), Start())
    assert torch.equal(weights[0], before)
    assert module.head.weight.requires_grad


# ------------------------------------------------------------------ out of memory, within the search


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_sizes_that_do_not_fit_are_found_by_bisection(error: Exception, use: Use) -> None:
    class Small(Foreign):
        def forward(self, values: Tensor) -> Tensor:
            if len(values) > 700:
                raise error
            return super().forward(values)

    data, finder = Rows(), MicroBatchFinder(ALL)
    use(data, 10**6)  # far more than fits: predictions don't help
    trainer = train(Small(), data, finder)
    most = 350  # a validation batch has twice as many rows
    assert 0.9 * most / 1.05 - 1 <= data.micro_batch_size <= 0.9 * most
    assert trainer.global_step == 12
    assert data.set == [data.micro_batch_size]
    failed = [size for size, peak, _ in finder.describe()["tried"] if peak is None]
    assert failed
    assert min(failed) > most


def test_what_stays_held_after_an_oom_is_an_error(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    kept: list[Tensor] = []

    class Leaks(Foreign):
        def forward(self, values: Tensor) -> Tensor:
            if len(values) > 50:
                kept.append(torch.empty(1000))
            return super().forward(values)

    module, data = Leaks(), Rows()
    module.largest = 50
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finder_module, "limits", lambda *_: [Limit("RLIMIT_AS", 10**6, 0, raises=True)])
        patch.setattr(finder_module, "make_meter", lambda *_, **__: FakeMeter(data))
        patch.setattr(finder_module, "map_large_blocks", lambda: None)
        finder = MicroBatchFinder(MemoryConfig(min_speedup=None, cache=False))
        with pytest.raises(RuntimeError, match=r"\(4000 bytes\) are still held after a trial step of"):
            train(module, data, finder)
        cache_module.forget()
        module = Foreign()
        module.largest = 50  # what it keeps as an attribute is put back, so that nothing is held
        train(module, data, finder)
    assert data.micro_batch_size <= 22


def test_not_even_the_smallest_fits(use: Use, caplog: pytest.LogCaptureFixture) -> None:
    data, module, finder = Rows(step=8), Foreign(OPTIMIZERS["adamw"]), MicroBatchFinder(ALL)
    module.largest = 7  # the loader's batches of 4 do fit
    use(data, 10**6)
    trainer = train(module, data, finder)
    assert trainer.global_step == 12
    assert data.set == [8]
    [record] = [record for record in caplog.records if record.name == cache_module.__name__]
    assert record.levelno == logging.WARNING
    assert (
        "micro-batch size 8: not even this fits (out of memory in the search for a batch size: 3.0 GiB requested"
        in record.message
    )
    again = Rows(step=8)
    train(module, again, MicroBatchFinder(ALL))
    assert (again.set, again.made) == ([8], [])


def test_an_oom_in_the_first_optimizer_step_leaves_no_state(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            if not calls:
                calls.append(1)
                raise MemoryError
            return None

    calls: list[int] = []
    data, module = Rows(), Foreign(lambda parameters: Fails(parameters, lr=0.1))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    use(data, 10_000)

    class Start(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == trainer.current_epoch == 0:
                assert not trainer.optimizers[0].state
                assert_same(dict(pl_module.state_dict()), before)

    train(module, data, MicroBatchFinder(ALL), Start())
    assert data.set == [2]


# ------------------------------------------------------------------ when there is nothing to search


def test_without_a_stated_limit_enough_is_taken(use: Use, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning_bge")
    for _ in range(2):
        data, finder = Rows(), MicroBatchFinder()
        use(data, None)
        train(Foreign(), data, finder)
        assert (data.set, data.made) == ([8192], [])
    [record] = [record for record in caplog.records if record.name == cache_module.__name__]
    assert record.message.startswith("micro-batch size 8,192: no limit on memory is stated")
    assert finder.describe()["tried"] == []


def test_where_memory_cannot_be_measured_enough_is_taken(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    data, finder = Rows(), MicroBatchFinder(MemoryConfig(default_size=77))
    use(data, 10_000)
    monkeypatch.setattr(finder_module, "make_meter", lambda *_, **__: "no meter here")
    train(Foreign(), data, finder)
    assert (data.set, finder.reason) == ([77], "no meter here")
    assert "mps" in probe_module.make_meter(torch.device("mps"))  # type: ignore[operator]
    monkeypatch.setattr(probe_module, "_CLEAR_REFS", Path("/nowhere/clear_refs"))
    assert "can't be measured" in probe_module.make_meter(torch.device("cpu"))  # type: ignore[operator]


def test_a_number_of_the_users_is_left_alone(use: Use) -> None:
    data, finder = Rows(auto_micro_batch_size=False), MicroBatchFinder()
    use(data, 10_000)
    train(Foreign(), data, finder)
    assert (data.set, finder.micro_batch_size) == ([], None)


def test_the_module_may_be_the_batch_source_and_none_is_said(use: Use, caplog: pytest.LogCaptureFixture) -> None:
    rows = Rows()

    class Makes(Foreign):
        micro_batch_size_step = 2
        micro_batch_size = 4

        def worst_case_batch(self, size: int, train: bool) -> Tensor:
            return rows.worst_case_batch(size, train)

        def set_micro_batch_size(self, size: int) -> None:
            rows.set_micro_batch_size(size)

    use(rows, 10_000)
    loader = rows.train_dataloader()
    quiet_trainer(callbacks=[MicroBatchFinder(ALL)]).fit(Makes(), loader, loader)
    assert rows.set == [pytest.approx(0.9 * 970, rel=0.05)]
    finder = MicroBatchFinder(ALL)
    for _ in range(2):
        quiet_trainer(callbacks=[finder]).fit(Foreign(), loader, loader)
    assert finder.reason.startswith("no micro-batch size: neither data module nor module is a batch source")
    assert caplog.text.count("no micro-batch size") == 1


# ------------------------------------------------------------------ the host's blocks


@pytest.mark.parametrize(("total", "mapped"), [(10_000, 0), (1_000, 1)])
def test_blocks_are_mapped_only_where_memory_decides(
    use: Use, monkeypatch: pytest.MonkeyPatch, total: int, mapped: int
) -> None:
    for known in range(2):
        data, finder, calls = Rows(), MicroBatchFinder(MemoryConfig(default_size=100)), []
        use(data, total)
        monkeypatch.setattr(finder_module, "map_large_blocks", lambda calls=calls: calls.append(1))
        module = Foreign()
        module.largest = (total - HELD) // ROW * 2
        train(module, data, finder)
        assert len(calls) == mapped
        assert finder.describe()["mapped"] == bool(mapped)
        assert bool(data.made) != bool(known)
        assert data.micro_batch_size == 100 if not mapped else 50 < data.micro_batch_size <= 0.9 * 70


# ------------------------------------------------------------------ the cache


def search(use: Use, folder: Path | None = None, total: int = 10_000, **changes: Any) -> tuple[Rows, MicroBatchFinder]:
    data = changes.pop("data", None) or Rows()
    finder = MicroBatchFinder(changes.pop("config", ALL), cache_dir=folder)
    use(data, total)
    train(changes.pop("module", None) or Foreign(), data, finder, **changes)
    return data, finder


def test_the_second_run_makes_no_trial_step(use: Use, tmp_path: Path) -> None:
    first, finder = search(use)
    assert not finder.describe()["from_cache"]
    for forget in (False, True):  # from this process, and from the file
        if forget:
            cache_module.forget()
        second, finder = search(use)
        assert (second.set, second.made) == (first.set, [])
        described = finder.describe()
        assert described["from_cache"]
        assert json.loads(json.dumps(described)) == described or not forget
        assert (described["limit"], described["limit_bytes"], described["safety_margin"]) == ("RLIMIT_AS", 10_000, 0.1)
        assert described["peak"] == HELD + ROW * first.micro_batch_size
        assert "as much as the limit is predicted to allow" in described["reason"]
    path = tmp_path / "cache" / FILE
    assert path.stat().st_mode & 0o077 == 0
    assert sorted(file.name for file in path.parent.iterdir()) == [FILE, f"{FILE}.lock"]


def test_what_a_step_takes_decides_what_is_found_again(use: Use) -> None:
    search(use)
    others: list[dict[str, Any]] = [
        {"total": 20_000},
        {"config": MemoryConfig(min_speedup=None, safety_margin=0.2)},
        {"module": Foreign(OPTIMIZERS["adamw"])},
        {"data": Rows(micro_batch_size_key={"max_length": 3})},
        {"data": Rows(step=3)},
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": None},
    ]
    for changes in others:
        assert search(use, **changes)[0].made, changes
    larger, flagged, same = Foreign(), Foreign(), Foreign(lambda parameters: torch.optim.SGD(parameters, 0.3, 0.5))
    larger.head = nn.Linear(6, 2)
    flagged.body.gradient_checkpointing = True  # type: ignore[assignment]
    assert search(use, module=larger)[0].made
    assert search(use, module=flagged)[0].made
    same.body[2].p = 0.3  # rates change no memory, whether there is dropout does
    assert not search(use, module=same)[0].made
    same.body[2].p = 0.0
    assert search(use, module=same)[0].made


def test_without_a_cache_only_this_process_remembers(use: Use, tmp_path: Path) -> None:
    config = MemoryConfig(min_speedup=None, cache=False)
    assert search(use, config=config)[0].made
    assert not search(use, config=config)[0].made
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"schema_version": 1}', '{"schema_version": 1, "sizes": {"a": {"micro_batch_size": -1}}}'],
)
def test_a_damaged_file_is_put_aside(use: Use, tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.joinpath(FILE).write_text(content)
    data, _ = search(use, tmp_path)
    assert data.made
    assert (tmp_path / "micro_batch_sizes.damaged").read_text() == content
    assert caplog.text.count("can't be read") == 1
    cache_module.forget()
    assert not search(use, tmp_path)[0].made


def test_a_folder_that_cannot_be_written_is_said_once(
    use: Use, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        search(use, tmp_path / "file" / "cache")
    assert caplog.text.count("each process finds its own") == 1


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    def write(first: int) -> None:
        for number in range(first, first + 20):
            MicroBatchSizes(tmp_path).put(str(number), FoundSize(number + 1, ""))

    threads = [threading.Thread(target=write, args=(20 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache_module.forget()
    assert [MicroBatchSizes(tmp_path).get(str(number)) for number in (0, 19, 79)] == [
        FoundSize(number + 1, "") for number in (0, 19, 79)
    ]
    assert len(json.loads((tmp_path / FILE).read_text())["sizes"]) == 80


@pytest.mark.parametrize("fails", [False, True])
def test_a_micro_batch_size_that_is_lowered_is_stored(use: Use, fails: bool) -> None:
    class Lowers(Callback):
        """As a callback or the module itself does it after an OOM."""

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 3:
                trainer.datamodule.set_micro_batch_size(123)  # type: ignore[attr-defined]
                if fails:
                    raise torch.OutOfMemoryError("out of memory")

    data, finder = Rows(), MicroBatchFinder(ALL)
    use(data, 10_000)
    try:
        train(Foreign(), data, Lowers(), finder)
    except torch.OutOfMemoryError:
        assert fails
    assert finder.micro_batch_size == 123
    assert finder.reason.startswith("lowered from 8")
    finder.lower(200)  # no lower one
    assert finder.micro_batch_size == 123
    cache_module.forget()
    data, finder = search(use)
    assert (data.set, data.made) == ([123], [])
    # another process lowers it further
    entries = json.loads((finder._sizes.folder / FILE).read_text())["sizes"]  # type: ignore[operator]
    [(key, entry)] = entries.items()
    known = dict(cache_module._known)
    MicroBatchSizes(finder._sizes.folder).put(key, FoundSize(**{**entry, "micro_batch_size": 50}))
    cache_module._known.update(known)
    assert search(use)[0].set == [50]


def test_all_ranks_take_the_smallest(use: Use, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def smaller(tensor: Tensor, op: Any) -> None:
        assert op == torch.distributed.ReduceOp.MIN
        tensor.clamp_(max=99)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert search(use)[0].set == [pytest.approx(0.9 * 970, rel=0.05)]
        monkeypatch.setattr(torch.distributed, "all_reduce", smaller)
        for total in (10_000, 20_000):  # known, and new
            assert search(use, total=total)[0].set == [99]
        assert search(use, total=20_000)[0].made == []
    finally:
        torch.distributed.destroy_process_group()


def on_two_ranks(folder: str) -> tuple[Any, ...]:
    """A foreign module under plain DDP; on rank 1 less fits."""
    rank = int(os.environ["RANK"])
    module, data, finder = Foreign(), Rows(), MicroBatchFinder(ALL, cache_dir=folder)
    module.largest = 400 if rank else 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finder_module, "limits", lambda *_: [Limit("RLIMIT_AS", 10**6, 0, raises=True)])
        patch.setattr(finder_module, "make_meter", lambda *_, **__: FakeMeter(data))
        patch.setattr(finder_module, "map_large_blocks", lambda: None)
        warnings.filterwarnings("ignore")
        train(module, data, finder, devices=2, strategy="ddp")
    assert isinstance(finder.micro_batch_size, int)
    return data.set, len(data.made), [parameter.tolist() for parameter in module.parameters()]


def test_ranks_search_on_their_own_and_agree(tmp_path: Path) -> None:
    first, second = run_ranks(on_two_ranks, str(tmp_path))
    assert first[0] == second[0]
    assert 0.9 * 200 / 1.05 - 2 <= first[0][0] <= 0.9 * 200
    assert first[1] != second[1]  # they made as many trial steps as each needed
    assert first[2] == second[2]


# ------------------------------------------------------------------ settings and meters


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"limit_gb": 0}, "memory.limit_gb: expected a number above 0, or null, got 0"),
        ({"limit_gb": math.nan}, "memory.limit_gb"),
        ({"safety_margin": 1.0}, r"memory.safety_margin: expected 0 to below 1, got 1.0"),
        ({"safety_margin": -0.1}, "memory.safety_margin"),
        ({"min_speedup": -1}, "memory.min_speedup: expected 0 or more, or null, got -1"),
        ({"default_size": 0}, "memory.default_size: expected 1 token or more, got 0"),
    ],
)
def test_bad_settings(bad: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        MemoryConfig(**bad)


linux = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured on Linux")


@linux
def test_the_meter_sees_what_was_freed_again() -> None:
    meter = HostMeter(address_space=False)
    for size in (64, 16):
        meter.start()
        torch.ones(size * 2**18)  # 4 bytes each
        assert meter.peak() == pytest.approx(size * 2**20, abs=8 * 2**20)
    assert meter.now() <= meter.now()


@linux
def test_the_meter_sees_address_space_that_nobody_has_written() -> None:
    status = process_bytes()
    unseen = status["VmPeak"] - status["VmSize"] + 64 * 2**20  # enough for a new peak
    for address_space, least in ((False, 0), (True, unseen - 8 * 2**20)):
        meter = HostMeter(address_space)
        meter.start()
        torch.empty(unseen + 64 * 2**20 * address_space, dtype=torch.uint8)
        assert least <= meter.peak() <= least + 2 * 64 * 2**20
        meter.start()
        torch.empty(32 * 2**20, dtype=torch.uint8)  # no new one
        assert meter.peak() < 8 * 2**20


def test_what_may_be_tried_is_tried_on_a_gpu_only() -> None:
    known = [Limit("a", 100, 0, raises=True), Limit("b", 75, 0), Limit("c", 90, 20, raises=True)]
    assert finder_module._free_memory(known, on_host=False) == FreeMemory(70, 75)
    assert finder_module._free_memory(known, on_host=True) == FreeMemory(None, 70)
    assert finder_module._free_memory([], on_host=True) == FreeMemory(None, None)


def test_what_others_may_yet_take_to_save_time_is_left_to_them(use: Use) -> None:
    free, _ = search(use)
    spare = SimpleCache(capacity=4000, nbytes=1000)
    register_cache(spare)
    known = [Limit("a", 10_000, 0)]
    assert finder_module._free_memory(known, on_host=True) == FreeMemory(None, 7000)
    assert finder_module._free_memory(known, on_host=False) == FreeMemory(None, 10_000)
    assert finder_module._free_memory([Limit("a", 2000, 0)], on_host=True) == FreeMemory(None, 0)
    first, finder = search(use)
    assert not finder.describe()["from_cache"]  # what was found without it would be too much
    assert HELD + ROW * first.micro_batch_size <= 7000 < HELD + ROW * free.micro_batch_size
    spare.nbytes = 4000
    again, finder = search(use)
    assert finder.describe()["from_cache"]
    assert again.micro_batch_size == first.micro_batch_size
    del spare
    assert finder_module._free_memory(known, on_host=True) == FreeMemory(None, 10_000)


@linux
def test_a_given_limit_is_searched_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With real memory: at least 12,000 bytes of a row's activations, of a validation batch of two, and 40 MiB."""
    monkeypatch.setattr(finder_module, "map_large_blocks", lambda: None)
    data = Rows(step=64)
    finder = MicroBatchFinder(MemoryConfig(limit_gb=used_gb() + 40 / 1024, min_speedup=None, cache=False))

    class Wide(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 1000), nn.Linear(1000, 6))
            self.frozen = nn.Sequential()

    train(Wide(), data, finder)
    assert finder.describe()["limit"] == "memory.limit_gb"
    assert 800 < data.micro_batch_size < 3400
    assert finder.describe()["peak"] < 40 * 2**20


def used_gb() -> float:
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 2**20


# ------------------------------------------------------------------ our own module


def test_our_module_trains_the_same_after_the_search(tmp_path: Path, use: Use) -> None:
    folder = save_model(tmp_path / "model", dropout=0.1)
    lines = [f"w{row % 7} w{row % 5} w{row % 3}\tw{row % 11}\t{'yes' if row % 3 else 'no'}" for row in range(24)]
    (tmp_path / "train.tsv").write_text("text_a\ttext_b\tlabel\n" + "\n".join(lines) + "\n")
    found = []

    def load(*args: Any, **options: Any) -> TextClassifier:
        net = load_classifier(*args, **options)
        net.register_forward_pre_hook(refuse)
        return net

    def refuse(net: Any, inputs: tuple[MicroBatch]) -> None:
        if sum(inputs[0].lengths) > 2 * 1970:
            raise torch.OutOfMemoryError("CUDA out of memory")

    for finders in ([], [MicroBatchFinder(ALL)]):
        data = TextDataModule(
            folder, train_file=str(tmp_path / "train.tsv"), max_length=16, batch_size=4, cache_dir=str(tmp_path / "c"),
        )  # fmt: skip
        data.setup("fit")
        made, make = [16], data.worst_case_batch
        data.worst_case_batch = lambda size, train, make=make, made=made: (  # type: ignore[method-assign, misc]
            made.append(size),
            make(size, train),
        )[1]
        counted = Rows()
        counted.made = made
        use(counted, 20_000)
        module, losses = BGEClassifier(folder, optimizer=OptimizerConfig(lr=1e-3)), Losses()
        module.load = load
        seed_everything(5)
        trainer = train(module, data, *finders, losses, gradient_clip_val=None)
        found.append((everything(module, trainer), losses.seen))
        if finders:
            assert len(made) > 5
            assert data.micro_batch_size % 16 == 0
            assert data.micro_batch_size == pytest.approx(0.9 * 1970, rel=0.06)
            assert module.oom_retry.records == []
    assert_same(*found)


# ------------------------------------------------------------------ a real limit


SCRIPT = """
import json, resource, sys, warnings
warnings.filterwarnings("ignore")
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning_bge.callbacks.micro_batch.config import MemoryConfig
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.runtime.memory import process_bytes
from lightning_bge.runtime.oom import find_oom
from torch import nn

room, width, manual = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "manual"
torch.set_num_threads(1)

class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = not manual
        layers = [part for _ in range(4) for part in (nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1))]
        self.net = nn.Sequential(*layers, nn.Linear(width, 1))
    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        if not manual:
            return loss
        self.manual_backward(loss)
        optimizer = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
    def validation_step(self, batch, batch_idx):
        self.net(batch)
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

class Batches:
    def __init__(self, sizes):
        self.sizes = sizes
    def __iter__(self):
        return (torch.randn(size(), width) for size in self.sizes)
    def __len__(self):
        return len(self.sizes)

class Rows(LightningDataModule):
    micro_batch_size = 1
    def worst_case_batch(self, size, train):
        return torch.randn(size * (1 if train else 2), width)
    def set_micro_batch_size(self, size):
        self.micro_batch_size = size
    def train_dataloader(self):
        return Batches([lambda: self.micro_batch_size] * 10 + [lambda: int(1.35 * self.micro_batch_size)])
    def val_dataloader(self):
        return Batches([lambda: 2 * self.micro_batch_size] * 2)

finder, data = MicroBatchFinder(MemoryConfig(min_speedup=None, cache=False)), Rows()
off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
trainer = Trainer(**dict.fromkeys(off, False), max_epochs=1, accelerator="cpu", num_sanity_val_steps=0,
                  callbacks=[finder], val_check_interval=5, gradient_clip_val=None if manual else 1.0)
module = Plain()
size = process_bytes()["VmSize"] + room * 2**20
resource.setrlimit(resource.RLIMIT_AS, (size, size))
end = "nothing failed"
try:
    trainer.fit(module, datamodule=data)
except Exception as error:
    end = "oom" if find_oom(error) else repr(error)
print(json.dumps({"batch": trainer.fit_loop.epoch_loop.batch_idx, "end": end, **finder.describe()}))
"""


def run_limited(room: int, width: int, kind: str, tmp_path: Path) -> dict[str, Any]:
    """Search, train 10 steps at the answer with validation, and one at 1.35 times the answer."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LIGHTNING_BGE_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, str(room), str(width), kind]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def check_limited(found: dict[str, Any]) -> None:
    assert found["limit"] == "RLIMIT_AS"
    assert found["micro_batch_size"] > 1000
    assert len(found["tried"]) < 15
    assert (found["batch"], found["end"]) == (10, "oom"), found  # the first ten fit, the larger one does not


@linux
def test_the_answer_holds_under_a_real_limit(tmp_path: Path) -> None:
    check_limited(run_limited(100, 192, "auto", tmp_path))


@linux
@pytest.mark.slow
def test_the_answer_holds_in_twenty_runs_under_different_limits(tmp_path: Path) -> None:
    for run in range(20):
        check_limited(run_limited(100 + 17 * run, 128 + 64 * (run % 3), ("auto", "manual")[run % 2], tmp_path))
