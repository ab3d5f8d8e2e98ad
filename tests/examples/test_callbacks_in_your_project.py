from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lightning_bge.callbacks.compile.callback import CompileLayers
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.callbacks.oom import OOMHandler
from lightning_bge.callbacks.torch_backends import TorchBackends
from lightning_bge.callbacks.train_mode import TrainMode
from tests.examples.test_examples import load

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*in eval mode:UserWarning"),
]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("LIGHTNING_BGE_CACHE", str(tmp_path))
    return load("callbacks_in_your_project")


def get(trainer: Any, kind: type) -> Any:
    [callback] = [callback for callback in trainer.callbacks if isinstance(callback, kind)]
    return callback


def test_the_callbacks_work_in_a_project_that_uses_nothing_else_of_ours(
    own: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_float32_matmul_precision()
    trainer = own.main()
    assert trainer.global_step == 16
    assert get(trainer, TrainMode).switched == ["encoder", "encoder.0", "encoder.1"]
    assert "fp32 matrix products" in get(trainer, TorchBackends).describe()
    assert torch.get_float32_matmul_precision() == before
    finder = get(trainer, MicroBatchFinder)
    assert finder.tried
    assert trainer.datamodule.micro_batch_size == finder.micro_batch_size >= 32
    assert get(trainer, OOMHandler).records == []
    assert get(trainer, CompileLayers).reason.startswith("compile off: 5 steps left")
    assert trainer.callback_metrics["train_tokens_per_s"] > 0
    assert finder.reason in capsys.readouterr().out

    again = own.main()  # what was found is known now
    assert not get(again, MicroBatchFinder).tried
    assert again.datamodule.micro_batch_size == finder.micro_batch_size


def test_an_oom_in_that_project_is_recorded_and_the_next_run_begins_with_less(own: ModuleType) -> None:
    class Full(own.OwnModule):  # type: ignore[misc, name-defined]
        fails = True

        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            if self.fails and self.trainer.global_step == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().forward(batch)

    trainer, data = own.make_trainer(), own.OwnData()
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit(Full(), data)
    [record] = get(trainer, OOMHandler).records
    assert (record.where, record.requested) == ("forward", 2 * 2**30)
    finder = get(trainer, MicroBatchFinder)
    assert data.micro_batch_size == finder.micro_batch_size
    assert finder.reason == f"lowered from {2 * finder.micro_batch_size:,} after an OOM"

    Full.fails = False
    trainer, data = own.make_trainer(), own.OwnData()
    trainer.fit(Full(), data)
    assert not get(trainer, MicroBatchFinder).tried
    assert data.micro_batch_size == finder.micro_batch_size
