"""The observer sees what happens and changes none of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor

from lightning_bge.advisor.audit.observe import Cycle, Observation, Watch, look_at
from lightning_bge.advisor.audit.trace import Trace
from tests.helpers.foreign_modules import Accumulating, Classifier, loader

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*log_every_n_steps.*")


def fit(module: L.LightningModule, *callbacks: L.Callback, batches: int = 7, **options: Any) -> L.Trainer:
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(
        **{"accelerator": "cpu", "max_epochs": 2, "limit_train_batches": batches, **off, **options},
        callbacks=list(callbacks),
    )
    torch.manual_seed(0)
    trainer.fit(module, loader())
    return trainer


def watched(module: L.LightningModule, **options: Any) -> Observation:
    watch = Watch()
    fit(module, watch, **options)
    return watch.observation


def test_weights_are_the_same_bit_for_bit_as_without_it() -> None:
    alone, seen = Classifier(), Classifier()
    fit(alone)
    fit(seen, Watch())
    for one, other in zip(alone.parameters(), seen.parameters(), strict=True):
        assert torch.equal(one, other)


def test_windows_of_automatic_accumulation() -> None:
    found = watched(Classifier(), accumulate_grad_batches=3)
    assert found.windows == [24, 24, 8] * 2
    assert found.batches_per_step == 3
    assert found.left == [0, 0]


def test_rows_behind_the_last_step_of_a_manual_loop_and_gradients_that_stay() -> None:
    class Dropping(Accumulating):
        def ends(self, batch_idx: int) -> bool:
            return False

    found = watched(Dropping(every=3))
    assert found.windows == [24, 24] * 2
    assert found.left == [1, 1]


def test_gradients_that_are_never_cleared_are_told_from_zeros() -> None:
    class Never(Classifier):
        def optimizer_zero_grad(self, *args: Any) -> None:
            pass

    class Zeros(Classifier):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
            optimizer.zero_grad(set_to_none=False)

    assert set(watched(Never()).kept) == {"not cleared"}
    assert set(watched(Zeros()).kept) == {"zeros"}
    assert not watched(Classifier()).kept


def test_three_steps_are_traced_and_none_of_them_is_timed() -> None:
    found = watched(Classifier())
    assert len(found.traces) == 3
    # an epoch's last batch is no whole cycle, two warm up, three are traced, and one more with lines of code
    assert len(found.timed) == 2 * 6 - 2 - 4


def test_of_an_accumulated_step_all_batches_are_in_the_trace() -> None:
    one = watched(Classifier()).trace
    three = watched(Classifier(), accumulate_grad_batches=3, batches=12).trace
    assert one is not None
    assert three is not None
    assert three.masks == 3 * one.masks
    assert three.optimizer["aten::_fused_adamw_"] == one.optimizer["aten::_fused_adamw_"] == 1


def test_everything_is_put_back_also_after_an_exception() -> None:
    class Failing(Classifier):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if self.trainer.global_step == 11:  # while it is traced
                raise RuntimeError("planted")
            return super().training_step(batch, batch_idx)

    for module in (Classifier(), Failing()):
        watch = Watch()
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        assert isinstance(trainer.profiler, PassThroughProfiler)
        trainer.fit_loop.max_epochs = 2
        trainer.limit_train_batches = 7
        trainer.callbacks.append(watch)
        if isinstance(module, Failing):
            with pytest.raises(RuntimeError, match="planted"):
                trainer.fit(module, loader())
            assert len(watch.observation.traces) == 1  # and one with lines of code
        else:
            trainer.fit(module, loader())
        assert isinstance(trainer.profiler, PassThroughProfiler)
        assert "batch_to_device" not in vars(trainer.strategy)
        assert not torch.autograd._profiler_enabled()


def test_seconds_are_medians_over_the_cycles_that_nothing_slowed_down() -> None:
    slow = Cycle({"[A]x.fetch": 9.0}, 9.0, slowed=True)
    cycles = [Cycle({"[A]x.fetch": float(n)}, 10.0 + n) for n in range(5)]
    found = Observation(cycles=[*cycles, slow])  # the first two warm up
    assert found.seconds("fetch") == 3.0
    assert found.cycle_seconds == 13.0
    assert Observation().cycle_seconds == 0.0


def test_batches_of_several_kinds_are_counted() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    seen = look_at({"input_ids": mask, "attention_mask": mask})
    assert (seen.rows, seen.tokens, seen.places, seen.width, seen.longest) == (2, 4, 8, 4, 3)
    query = {"attention_mask": torch.ones(2, 3)}
    pairs = look_at({"query": query, "passages": [{"attention_mask": mask}], "negative_attention_mask": mask})
    # the query's mask is the fullest: nothing is padded to a fixed width there
    assert (pairs.rows, pairs.tokens, pairs.places, pairs.width, pairs.longest) == (2, 14, 22, 3, 3)
    assert look_at([torch.zeros(5, 2), torch.zeros(5)]).rows == 5
    assert look_at((torch.zeros(3), {"x": torch.zeros(1)})).tokens is None
    assert look_at("no tensor").rows is None


def test_the_usual_number_of_batches_counts_and_of_equals_the_larger_one() -> None:
    # fp16 leaves out steps whose gradients overflow
    assert Observation(behind=Counter({1: 12, 2: 1})).batches_per_step == 1
    assert Observation(behind=Counter({4: 2, 3: 2})).batches_per_step == 4
    assert Observation().batches_per_step == 0


def test_lines_of_code_are_found_in_the_second_step_that_is_traced() -> None:
    found = watched(Classifier(), accumulate_grad_batches=2, batches=7)
    assert found.located
    assert len(found.traces) == 2  # an epoch of four steps, of which one warms up and one is traced with lines of code


class Adversarial(Classifier):
    """Two optimizers, each of which clears its gradients before its own backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parts = (self.net.bert, self.net.classifier)
        return [torch.optim.AdamW(part.parameters(), lr=1e-4) for part in parts]


def test_gradients_of_another_optimizer_may_be_there() -> None:
    assert not watched(Adversarial()).kept


def test_an_empty_trace_has_all_parts() -> None:
    assert sum(Trace().parts.values()) == 0
