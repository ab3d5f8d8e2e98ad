"""An audit of unusual but sound projects, what it restores, and how its rows are judged."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn

from lightning_bge.advisor.audit.ablation import Ablation
from lightning_bge.advisor.audit.audit import audit, with_saving
from lightning_bge.advisor.audit.checks_compute import dropout, fused_optimizer
from lightning_bge.advisor.audit.checks_loop import effective_batch, persistent_workers, synchronization
from lightning_bge.advisor.audit.observation import Observation, OptimizerSteps, StepTrace
from lightning_bge.advisor.audit.requested import ObservedRun, Requested
from lightning_bge.advisor.audit.result import Fix, Row, TimeSaved
from lightning_bge.errors import ConfigError
from tests.helpers.audit_run import CPU, OBSERVE
from tests.helpers.foreign_modules import Classifier, Texts, collate, loader


def observed(seen: Observation, requested: Requested | None = None, devices: int = 1) -> ObservedRun:
    trainer: Any = SimpleNamespace(train_dataloader=SimpleNamespace())
    return ObservedRun(seen, requested or Requested(), Classifier(), trainer, devices)


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


def test_callbacks_of_all_kinds_are_left_out_or_run_and_nothing_is_written(tmp_path: Path) -> None:
    callbacks = [LearningRateMonitor(), TQDMProgressBar(), EarlyStopping("val_loss")]
    found = audit(
        Logging(tmp_path), loader(), {**CPU, "callbacks": callbacks, "val_check_interval": 50}, config=OBSERVE
    )
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
def test_no_alarm_for_an_unusual_module(kind: type[Classifier]) -> None:
    found = audit(kind(), loader(), CPU, config=OBSERVE)
    assert not found.alarms
    assert (
        found.row("padding").evidence == "56 tokens computed in one step, 54 of them without padding"
    )  # each text once, and no lookups of positions


def test_a_batch_of_questions_with_several_answers_each_is_no_mismatch() -> None:
    def answers(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = collate([row for row in rows for _ in range(4)])
        return {name: tensor[:32] for name, tensor in batch.items()}

    data = torch.utils.data.DataLoader(Texts(), batch_size=8, collate_fn=answers)
    found = audit(Classifier(), data, CPU, config=OBSERVE)
    assert found.row("effective batch").in_effect == "32 rows"
    assert not found.alarms


def test_state_is_restored() -> None:
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
    audit(module, loader(), CPU, config=OBSERVE)
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
    audit(torch.compile(module, backend="eager"), loader(), CPU, config=OBSERVE)
    assert all(torch.equal(weights[name], tensor) for name, tensor in module.state_dict().items())


# ---------------------------------------------------------------------- rows by hand


def test_workers_of_a_validation_loader_that_start_later_are_no_restart() -> None:
    seen = Observation(workers=[frozenset({1, 2}), frozenset({1, 2, 3})])
    assert persistent_workers(observed(seen, Requested(persistent_workers=True))).verdict == "ok"
    seen = Observation(workers=[frozenset({1, 2}), frozenset({3, 4})])
    row = persistent_workers(observed(seen, Requested(persistent_workers=True)))
    assert row.verdict == "mismatch"
    assert row.fix is not None
    assert row.fix.yaml == ""  # another data module may not have the option of ours


def test_rows_of_all_devices_count() -> None:
    seen = Observation(steps=OptimizerSteps(rows=[16, 16]))
    assert effective_batch(observed(seen, Requested(effective_batch=64), devices=4)).verdict == "ok"
    assert effective_batch(observed(seen, Requested(effective_batch=64))).verdict == "mismatch"
    assert (
        effective_batch(observed(Observation(steps=OptimizerSteps(rows=[None])), Requested(effective_batch=64))).verdict
        == "unknown"
    )


def test_values_read_at_an_unknown_line_are_not_ok() -> None:
    trace = StepTrace(host_reads=Counter({"?": 3}))
    assert synchronization(observed(Observation(traces=[trace]))).verdict == "unknown"
    assert synchronization(observed(Observation(traces=[trace], located=True))).verdict == "ok"


def test_a_compiled_graph_may_draw_all_masks_at_once() -> None:
    run = observed(Observation(), Requested(dropout=True))
    assert dropout(ROW, run, StepTrace(masks=1)).verdict == "mismatch"
    assert dropout(ROW, run, StepTrace(masks=1, compiled=Counter(masks=1))).verdict == "ok"


def test_the_optimizers_main_operation_is_named_first() -> None:
    trace = StepTrace(optimizer=Counter({"aten::add_": 210, "aten::_foreach_add_": 2, "aten::_fused_adamw_": 1}))
    row = fused_optimizer(ROW, observed(Observation()), trace)
    assert (row.in_effect, row.evidence.split(": ", 1)[1].split()[0]) == ("fused", "aten::_fused_adamw_")


@pytest.mark.parametrize(("seconds", "verdict"), [(0.3, "improve"), (0.01, "ok")])
def test_a_kernel_per_parameter_is_an_alarm_where_the_optimizer_takes_time(seconds: float, verdict: str) -> None:
    trace = StepTrace(seconds=1.0, optimizer=Counter({"aten::_foreach_addcdiv_": 1}))
    trace.parts["optimizer"] = seconds
    trainer: Any = SimpleNamespace(optimizers=[torch.optim.AdamW([torch.zeros(1)])])
    row = fused_optimizer(ROW, ObservedRun(Observation(), Requested(), Classifier(), trainer), trace)
    assert (row.in_effect, row.verdict) == ("foreach", verdict)
    assert row.time_saved is not None
    assert (row.time_saved.low, row.time_saved.high, row.time_saved.kind) == (0.0, seconds, "predicted")


# ---------------------------------------------------------------------- time saved


ROW = Row("compute", "x", "not stated", "no", "ok", "seen")
ON, OFF = Ablation("x", {}, True, "on against off"), Ablation("x", {}, False, "on against off", "x: on")


def test_what_is_slower_when_on_is_to_be_switched_off() -> None:
    found = with_saving(ROW, TimeSaved(-1.1, -1.0, -0.9, "measured", ""), ON)
    assert (found.verdict, found.fix) == ("improve", Fix("switch it off: on against off", "one line"))
    assert found.time_saved is not None
    assert found.time_saved.low <= found.time_saved.mid <= found.time_saved.high
    assert found.time_saved.mid == pytest.approx(0.5)


def test_what_is_off_and_saves_time_is_to_be_switched_on() -> None:
    found = with_saving(ROW, TimeSaved(0.05, 0.1, 0.15, "measured", ""), OFF)
    assert (found.verdict, found.fix) == ("improve", Fix("switch it on: on against off", "one line", yaml="x: on"))
    assert with_saving(ROW, TimeSaved(-0.01, 0.1, 0.15, "measured", ""), OFF).verdict == "ok"


def test_a_mismatch_has_no_time_saved_by_its_own_option() -> None:
    mismatch = Row("compute", "x", "on", "no", "mismatch", "seen")
    saved = TimeSaved(0.05, 0.1, 0.15, "measured", "")
    assert with_saving(mismatch, saved, ON).time_saved is None
    assert with_saving(ROW, saved, ON).time_saved == saved


def test_the_row_states_why_its_saving_was_not_measured() -> None:
    found = with_saving(ROW, "its saving was not measured: no", OFF)
    assert found.time_saved is None
    assert found.evidence.endswith("; its saving was not measured: no")


# ---------------------------------------------------------------------- arguments


def test_a_trainer_instead_of_its_arguments_is_refused() -> None:
    trainer: Any = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigError, match=r"trainer must be a dict of arguments for lightning.Trainer, got Trainer"):
        audit(Classifier(), loader(), trainer)


def test_a_module_of_torch_is_refused() -> None:
    module: Any = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="module must be a LightningModule, got Linear"):
        audit(module, loader())


def test_the_package_exports_the_function() -> None:
    code = (
        "import lightning_bge.advisor.audit, lightning_bge; from lightning_bge import audit; "
        "assert callable(audit) and audit is lightning_bge.audit"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
