from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, Timer
from lightning.pytorch.plugins import MixedPrecision

from lightning_bge.errors import ConfigError
from lightning_bge.trainer import BGETrainer, quiet_trainer

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
def test_fp16_is_for_cuda_devices(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.raises(ConfigError, match=r"16-mixed needs a CUDA device, the run is on cpu\. Set 32-true \(this CPU"):
        BGETrainer(precision="16-mixed", accelerator=accelerator, **QUIET)


def test_auto_on_an_older_gpu_asks_lightning_for_loss_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    monkeypatch.setattr("lightning_bge.trainer.choose_precision", lambda _: ("16-mixed", ""))
    monkeypatch.setattr("lightning_bge.trainer.chosen_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("lightning.pytorch.Trainer.__init__", lambda self, *_, **options: found.update(options))
    BGETrainer(**QUIET)
    assert found["precision"] == "16-mixed"
    assert MixedPrecision("16-mixed", "cpu").scaler is not None  # what Lightning makes of it


def test_each_fold_has_an_average_of_its_own() -> None:
    average, timer = EMAWeightAveraging(), Timer()
    given = {"callbacks": [average, timer], "precision": "32-true", "accelerator": "cpu"}
    found = [quiet_trainer(given).callbacks for _ in range(2)]  # type: ignore[attr-defined]
    averages = [one for callbacks in found for one in callbacks if isinstance(one, EMAWeightAveraging)]
    assert len({id(one) for one in (average, *averages)}) == 3
    assert all(timer in callbacks for callbacks in found)
