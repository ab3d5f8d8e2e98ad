"""Out of memory within the search, and under a real limit on the address space."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_bge.callbacks.micro_batch import finder as finder_module
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from tests.helpers.trial_steps import ALL, OPTIMIZERS, Foreign, Rows, Use, assert_same, train

pytestmark = [
    pytest.mark.usefixtures("forgetful"),
    pytest.mark.filterwarnings("ignore:Found . module.* in eval mode"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`"),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
]


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
    failed = [size for size, peak, _ in finder.tried if peak is None]
    assert failed
    assert min(failed) > most


def test_not_even_the_smallest_fits(use: Use, caplog: pytest.LogCaptureFixture) -> None:
    data, module, finder = Rows(step=8), Foreign(OPTIMIZERS["adamw"]), MicroBatchFinder(ALL)
    module.largest = 7  # the loader's batches of 4 do fit
    use(data, 10**6)
    trainer = train(module, data, finder)
    assert trainer.global_step == 12
    assert data.set == [8]
    [record] = [record for record in caplog.records if record.name == finder_module.__name__]
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
min_speedup = 0.05 if sys.argv[3] == "fast" else None
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
        return Batches([lambda: self.micro_batch_size] * 10 + [lambda: 4 * self.micro_batch_size])
    def val_dataloader(self):
        return Batches([lambda: 2 * self.micro_batch_size] * 2)

finder, data = MicroBatchFinder(MemoryConfig(min_speedup=min_speedup, default_size=1024, cache=False)), Rows()
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
print(json.dumps({"batch": trainer.fit_loop.epoch_loop.batch_idx, "end": end, "tried": finder.tried,
                  "micro_batch_size": finder.micro_batch_size, "reason": finder.reason}))
"""


def run_limited(room: int, width: int, kind: str, tmp_path: Path) -> dict[str, Any]:
    """Search, train 10 steps at the answer with validation, and one at four times the answer."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LIGHTNING_BGE_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, str(room), str(width), kind]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def check_limited(found: dict[str, Any]) -> None:
    assert "(RLIMIT_AS)" in found["reason"]
    assert found["micro_batch_size"] > 1000
    assert len(found["tried"]) < 15
    assert (found["batch"], found["end"]) == (10, "oom"), found  # the first ten fit, the larger one does not


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux alone")
def test_the_answer_holds_under_a_real_limit(tmp_path: Path) -> None:
    check_limited(run_limited(100, 192, "auto", tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux alone")
def test_a_size_that_speed_has_ended_holds_too(tmp_path: Path) -> None:
    found = run_limited(100, 192, "fast", tmp_path)
    assert "(RLIMIT_AS)" in found["reason"]
    assert found["batch"] == 10, found  # four times as many may fit, too


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux alone")
@pytest.mark.slow
def test_the_answer_holds_in_twenty_runs_under_different_limits(tmp_path: Path) -> None:
    for run in range(20):
        check_limited(run_limited(100 + 17 * run, 128 + 64 * (run % 3), ("auto", "manual")[run % 2], tmp_path))
