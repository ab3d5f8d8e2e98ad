"""What an audit makes of unusual but sound projects, and what it leaves behind: nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn

from lightning_bge.advisor.audit.ablation import Measured, Variation
from lightning_bge.advisor.audit.audit import audit, judged
from lightning_bge.advisor.audit.checks_compute import Case, Gain, Row, dropout, fused
from lightning_bge.advisor.audit.checks_data import effective_batch, items, workers
from lightning_bge.advisor.audit.observe import Observation
from lightning_bge.advisor.audit.requested import Claims
from lightning_bge.advisor.audit.trace import Trace
from tests.advisor.audit.test_mismatches import CPU, WATCH, few_words
from tests.helpers.foreign_modules import Classifier, Texts, collate, loader

assert few_words


@pytest.fixture(autouse=True)
def quiet(few_words: Iterator[None]) -> None:
    """As there."""


def case(seen: Observation, claims: Claims | None = None, devices: int = 1) -> Case:
    trainer: Any = SimpleNamespace(train_dataloader=SimpleNamespace())
    return Case(seen, claims or Claims(), Classifier(), trainer, devices)


# ---------------------------------------------------------------------- projects as people write them


class Logging(Classifier):
    """Asks for a logger, and for callbacks that write and that end a training early."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.logger is not None
        self.logger.experiment.add_scalar("x", 1.0)
        return super().training_step(batch, batch_idx)

    def configure_callbacks(self) -> list[L.Callback]:
        saving = ModelCheckpoint(self.folder, every_n_train_steps=1, save_top_k=-1)
        return [saving, EarlyStopping("val_loss", check_on_train_epoch_end=True)]


def test_callbacks_of_all_kinds_are_met_and_nothing_is_written(tmp_path: Path) -> None:
    callbacks = [LearningRateMonitor(), TQDMProgressBar(), EarlyStopping("val_loss")]
    found = audit(Logging(tmp_path), loader(), {**CPU, "callbacks": callbacks, "val_check_interval": 50}, config=WATCH)
    assert not found.alarms
    assert not list(tmp_path.iterdir())


class Twice(Classifier):
    """Each text goes through the model twice, under two masks of dropout."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return (super().loss(batch) + super().loss(batch)) / 2


class Pooled(Classifier):
    """Token vectors are averaged by weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Linear(32, 1), nn.Linear(32, 2)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.net.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        pooled = (self.weight(hidden).softmax(dim=1) * hidden).sum(dim=1)
        return nn.functional.cross_entropy(self.head(pooled), batch["labels"])


class Frozen(Pooled):
    """Its encoder is not trained, and stays in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net.requires_grad_(False)
        self.net.eval()
        self.head = nn.Sequential(nn.Dropout(0.1), self.head)  # type: ignore[assignment]


class FusedSgd(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)


class Unfused(Classifier):
    """Its optimizer has no fused kernel."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.NAdam(self.parameters(), lr=1e-4)


class Growing(Classifier):
    """Its cache grows with the longest batch, and is no part of a checkpoint."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        self.register_buffer("cache", torch.zeros(batch["input_ids"].shape[1]), persistent=False)
        return super().loss(batch)


@pytest.mark.parametrize("kind", [Twice, Pooled, Frozen, FusedSgd, Unfused, Growing])
def test_no_false_alarm(kind: type[Classifier]) -> None:
    found = audit(kind(), loader(), CPU, config=WATCH)
    assert not found.alarms
    assert (
        found.row("padding").evidence == "56 tokens computed in one step, 54 of them real"
    )  # once, and of words alone


def test_a_batch_of_questions_with_several_answers_each_is_no_lie() -> None:
    def answers(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = collate([row for row in rows for _ in range(4)])
        return {name: tensor[:32] for name, tensor in batch.items()}

    data = torch.utils.data.DataLoader(Texts(), batch_size=8, collate_fn=answers)
    found = audit(Classifier(), data, CPU, config=WATCH)
    assert found.row("effective batch").in_effect == "32 rows"
    assert not found.alarms


def test_what_was_there_before_is_there_afterwards() -> None:
    class Counting(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()), persistent=False)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.count += 1
            self.net.eval()
            random.random()
            np.random.rand()
            return super().training_step(batch, batch_idx)

    module = Counting()
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    next(module.parameters()).grad = torch.ones(200, 32)
    modes = [part.training for part in module.modules()]
    numbers = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[union-attr]
    audit(module, loader(), CPU, config=WATCH)
    assert all(torch.equal(weights[name], tensor) for name, tensor in module.state_dict().items())
    assert module.count == 0
    assert [part.training for part in module.modules()] == modes
    assert [p.grad is not None for p in module.parameters()].count(True) == 1
    assert torch.equal(next(module.parameters()).grad, torch.ones(200, 32))  # type: ignore[arg-type]
    assert numbers[0] == random.getstate()
    assert numbers[1] == np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    assert torch.equal(numbers[2], torch.get_rng_state())


def test_a_module_that_was_given_to_torch_compile_as_a_whole() -> None:
    module = Classifier()
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    audit(torch.compile(module, backend="eager"), loader(), CPU, config=WATCH)
    assert all(torch.equal(weights[name], tensor) for name, tensor in module.state_dict().items())


# ---------------------------------------------------------------------- rows by hand


def test_workers_of_a_validation_loader_that_come_later_are_no_restart() -> None:
    seen = Observation(workers=[frozenset({1, 2}), frozenset({1, 2, 3})])
    assert workers(case(seen, Claims(persistent=True))).verdict == "ok"
    seen = Observation(workers=[frozenset({1, 2}), frozenset({3, 4})])
    assert workers(case(seen, Claims(persistent=True))).verdict == "lie"


def test_rows_of_all_devices_count() -> None:
    seen = Observation(windows=[16, 16])
    assert effective_batch(case(seen, Claims(effective_batch=64), devices=4)).verdict == "ok"
    assert effective_batch(case(seen, Claims(effective_batch=64))).verdict == "lie"
    assert effective_batch(case(Observation(windows=[None]), Claims(effective_batch=64))).verdict == "unknown"


def test_values_whose_place_was_not_found_out_are_not_called_right() -> None:
    trace = Trace()
    trace.items["?"] = 3
    assert items(case(Observation(traces=[trace]))).verdict == "unknown"
    assert items(case(Observation(traces=[trace], located=True))).verdict == "ok"


def test_a_compiled_graph_draws_its_masks_at_once() -> None:
    claims = Claims(dropout=True)
    assert dropout(case(Observation(traces=[Trace(masks=1)]), claims)).verdict == "lie"
    assert dropout(case(Observation(traces=[Trace(masks=1, seeds=1)]), claims)).verdict == "ok"


def test_the_operation_that_tells_is_named_first() -> None:
    trace = Trace()
    trace.optimizer.update({"aten::add_": 210, "aten::_foreach_add_": 2, "aten::_fused_adamw_": 1})
    row = fused(case(Observation(traces=[trace])))
    assert (row.in_effect, row.evidence.split(": ", 1)[1].split()[0]) == ("fused", "aten::_fused_adamw_")


# ---------------------------------------------------------------------- gains


ROW = Row("compute", "x", "not said", "no", "ok", "seen")


def test_what_is_better_off_says_what_being_off_saves() -> None:
    on = Variation("x", {}, True, "on against off")
    found = judged(ROW, [on], Measured([2.0, 2.0, 2.01], {"x": [1.0, 1.0, 1.0]}), {})
    assert (found.verdict, found.advice) == ("off", "switch it off: on against off")
    assert found.gain is not None
    assert found.gain.low <= found.gain.mid <= found.gain.high
    assert found.gain.mid == pytest.approx(0.5, abs=0.01)


def test_of_a_lie_no_gain_is_claimed_that_its_setting_does_not_bring() -> None:
    lie = Row("compute", "x", "on", "no", "lie", "seen")
    measured = Measured([1.0, 1.0], {"x": [2.0, 2.0]})
    assert judged(lie, [Variation("x", {}, True, "")], measured, {}).gain is None
    assert judged(ROW, [Variation("x", {}, True, "")], measured, {}).gain is not None


def test_advice_that_was_measured_to_help_is_an_alarm() -> None:
    gain = Gain(0.05, 0.1, 0.15, "measured", "")
    advised = Row("compute", "x", "not said", "foreach", "ok", "seen", advice="pass fused=True")
    assert judged(advised, [], Measured(), {"x": gain}).verdict == "off"
    assert judged(ROW, [], Measured(), {"x": gain}).verdict == "ok"
    none = Gain(-0.01, 0.1, 0.15, "measured", "")
    assert judged(advised, [], Measured(), {"x": none}).verdict == "ok"


def test_why_a_gain_was_not_measured_is_said() -> None:
    measured = Measured(skipped={"x": "the other side can't be trained: ValueError: no"})
    found = judged(ROW, [Variation("x", {}, False, "")], measured, {})
    assert found.gain is None
    assert found.evidence.endswith("its gain was not measured: the other side can't be trained: ValueError: no")
