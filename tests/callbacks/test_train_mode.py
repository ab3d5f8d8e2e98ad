"""Train mode is on, and the parts that were not are reported."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule
from torch import nn

from lightning_bge.callbacks.train_mode import TrainMode
from lightning_bge.errors import ConfigError
from tests.helpers.plain_module import Plain, train


class Modes(Callback):
    def __init__(self) -> None:
        self.training: list[dict[str, bool]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        self.training.append({name: part.training for name, part in pl_module.named_modules()})


def from_pretrained() -> Plain:
    """With parts in eval mode, as transformers gives them."""
    module = Plain()
    for part in (module.encoder, module.frozen, module.frozen_too):
        part.eval()
    return module


lightning_warns = pytest.mark.filterwarnings("ignore:Found . module.* in eval mode")


@lightning_warns
def test_without_it_a_part_stays_in_eval_mode() -> None:
    modes = Modes()
    train(from_pretrained(), modes)
    assert not modes.training[0]["encoder.1"]


def test_train_mode_is_on_in_every_epoch_and_every_fit(caplog: pytest.LogCaptureFixture) -> None:
    modes, mode, module = Modes(), TrainMode(), from_pretrained()
    train(module, mode, modes, max_epochs=2)
    assert all(all(step.values()) for step in modes.training)
    assert mode.switched[0] == "encoder"
    assert len(mode.switched) == 8
    [record] = [record for record in caplog.records if record.name.startswith("lightning_bge")]
    assert record.getMessage() == "TrainMode: 8 modules were in eval mode (first: encoder)"

    train(module, mode, modes)
    assert mode.switched == []
    module.encoder.eval()  # as `from_pretrained` leaves it when somebody loads new weights
    train(module, mode, modes)
    assert mode.switched == ["encoder", "encoder.0", "encoder.1"]
    assert all(all(step.values()) for step in modes.training)


@lightning_warns
def test_kept_parts_are_left_alone_with_all_below_them() -> None:
    modes = Modes()
    train(from_pretrained(), TrainMode(keep=("frozen",)), modes)
    [first, *_] = modes.training
    off = {name for name, training in first.items() if not training}
    assert off == {"frozen", "frozen.0", "frozen.0.0", "frozen.1"}  # not `frozen_too`, whose name begins alike


def test_keep_must_name_parts_of_the_module() -> None:
    with pytest.raises(ConfigError, match=r"TrainMode\.keep: Plain has no sub-module encoders, head\.x"):
        train(Plain(), TrainMode(keep=("frozen", "head.x", "encoders")))


def test_train_mode_reaches_what_is_built_late() -> None:
    class Late(Plain):
        def configure_model(self) -> None:
            self.late = nn.Dropout(0.5).eval()

    modes = Modes()
    train(Late(), TrainMode(), modes)
    assert modes.training[0]["late"]
