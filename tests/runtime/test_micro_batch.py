"""Whose micro-batch size is in effect: the data module, else the module."""

from __future__ import annotations

import pytest
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from lightning_bge.runtime.micro_batch import batch_source
from tests.helpers.small_models import quiet_trainer


class SizedData(BoringDataModule):
    micro_batch_size = 4

    def set_micro_batch_size(self, size: int) -> None:
        self.micro_batch_size = size


class SizedModule(BoringModel):
    micro_batch_size = 4

    def set_micro_batch_size(self, size: int) -> None:
        self.micro_batch_size = size


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_the_data_module_comes_before_the_module() -> None:
    data, module = SizedData(), SizedModule()
    trainer = quiet_trainer(limit_train_batches=1, limit_val_batches=0)
    assert batch_source(trainer, module) is module
    trainer.fit(module, datamodule=data)
    assert batch_source(trainer, module) is data


def test_a_size_that_cannot_be_set_does_not_count() -> None:
    module = BoringModel()
    assert batch_source(quiet_trainer(), module) is None
    module.micro_batch_size = 4  # type: ignore[assignment]
    assert batch_source(quiet_trainer(), module) is None
