"""Planted defects of batches and of the training loop."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from lightning_bge.advisor.audit.audit import audit
from lightning_bge.advisor.audit.requested import Requested
from tests.helpers.audit_run import CPU, OBSERVE, expect_alarm
from tests.helpers.foreign_modules import Accumulating, Classifier, loader

# ---------------------------------------------------------------------- batches


def test_all_texts_padded_to_512() -> None:
    assert "padded to 512" in expect_alarm(Classifier(), "padding", loader(width=512))


class Padding512(Classifier):
    """Pads on the device, where no loader shows it."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        wide = {k: nn.functional.pad(v, (0, 512 - v.shape[1])) if v.ndim == 2 else v for k, v in batch.items()}
        return super().loss(wide)


def test_all_texts_padded_to_512_within_the_module() -> None:
    assert "tokens computed" in expect_alarm(Padding512(), "padding")


def test_effective_batch_of_57_by_rounding_down() -> None:
    target, physical = 64, 19
    text = expect_alarm(
        Classifier(effective_batch_size=target),
        "effective batch",
        loader(physical, rows=190),
        accumulate_grad_batches=target // physical,
    )
    assert "57 rows" in text


def test_effective_batch_of_57_by_hand() -> None:
    module = Accumulating(every=64 // 19)
    assert "57 rows" in expect_alarm(module, "effective batch", loader(19, rows=190), Requested(effective_batch=64))


class Dropping(Accumulating):
    """Steps only after `every` batches."""

    def ends(self, batch_idx: int) -> bool:
        return False


def test_last_batches_neither_stepped_nor_cleared() -> None:
    text = expect_alarm(Dropping(every=3), "last batches of an epoch", loader(8, rows=80))
    assert "after the last optimizer step" in text


def test_last_rows_dropped_by_the_loader() -> None:
    text = expect_alarm(Classifier(), "last batches of an epoch", loader(8, rows=93, drop_last=True))
    assert "drops the last 5 rows" in text


# ---------------------------------------------------------------------- the loop


class Item(Classifier):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.history = [loss.item()]
        return loss


def test_item_every_step() -> None:
    assert "training_step" in expect_alarm(Item(), "synchronization")


class Branch(Classifier):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 0 if loss > 100 else loss


def test_a_branch_on_a_value_every_step() -> None:
    assert "training_step" in expect_alarm(Branch(), "synchronization")


def test_workers_restarted_every_epoch() -> None:
    assert "0 of 2" in expect_alarm(Classifier(), "persistent workers", loader(num_workers=2))


class OwnLoader(Classifier):
    def train_dataloader(self) -> Any:
        return loader(num_workers=1)


def test_workers_of_a_modules_own_loader_restarted() -> None:
    found = audit(OwnLoader(), None, CPU, config=OBSERVE)
    assert "persistent workers" in {row.name for row in found.alarms}


@pytest.mark.gpu
def test_batches_not_pinned() -> None:
    found = audit(Classifier(), loader(), {"accelerator": "cuda"}, config=OBSERVE)
    assert "pinned memory" in {row.name for row in found.alarms}


class Holder:
    """A custom batch class, which `pin_memory` leaves as it is."""

    def __init__(self, content: dict[str, Tensor]) -> None:
        self.content = content

    def values(self) -> Any:
        return self.content.values()

    def to(self, *args: Any, **options: Any) -> dict[str, Tensor]:
        return {name: tensor.to(*args, **options) for name, tensor in self.content.items()}


@pytest.mark.gpu
def test_batches_of_a_custom_class_are_not_pinned() -> None:
    data = loader(pin_memory=True)
    inner = data.collate_fn
    data.collate_fn = lambda rows: Holder(inner(rows))
    found = audit(Classifier(), data, {"accelerator": "cuda"}, config=OBSERVE)
    assert "pinned memory" in {row.name for row in found.alarms}
