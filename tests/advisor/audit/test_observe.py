"""The observer sees what happens, and changes nothing."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_bge.advisor.audit.observation import Cycle, Observation, OptimizerSteps, StepTrace, batch_stats
from lightning_bge.advisor.audit.observe import StepObserver
from tests.helpers.foreign_modules import Accumulating, Classifier, loader

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*log_every_n_steps.*")


def fit(module: L.LightningModule, observer: StepObserver | None = None, batches: int = 7, **options: Any) -> L.Trainer:
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(
        **{"accelerator": "cpu", "max_epochs": 2, "limit_train_batches": batches, **off, **options},
        callbacks=None if observer is None else [observer],
        profiler=None if observer is None else observer.profiler,
    )
    torch.manual_seed(0)
    trainer.fit(module, loader())
    return trainer


def observe(module: L.LightningModule, **options: Any) -> Observation:
    observer = StepObserver()
    fit(module, observer, **options)
    return observer.observation


def test_weights_are_the_same_bit_for_bit_as_without_it() -> None:
    alone, seen = Classifier(), Classifier()
    fit(alone)
    fit(seen, StepObserver())
    for one, other in zip(alone.parameters(), seen.parameters(), strict=True):
        assert torch.equal(one, other)


def test_rows_of_each_step_with_automatic_accumulation() -> None:
    found = observe(Classifier(), accumulate_grad_batches=3)
    assert found.steps.rows == [24, 24, 8] * 2
    assert found.steps.batches_per_step == 3
    assert found.steps.left_over == [0, 0]


def test_batches_after_the_last_step_of_a_manual_loop() -> None:
    class Dropping(Accumulating):
        def ends(self, batch_idx: int) -> bool:
            return False

    found = observe(Dropping(every=3))
    assert found.steps.rows == [24, 24] * 2
    assert found.steps.left_over == [1, 1]


def test_gradients_that_are_never_cleared_are_distinguished_from_zeros() -> None:
    class Never(Classifier):
        def optimizer_zero_grad(self, *args: Any) -> None:
            pass

    class Zeros(Classifier):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
            optimizer.zero_grad(set_to_none=False)

    assert set(observe(Never()).steps.stale_gradients) == {"not cleared"}
    assert set(observe(Zeros()).steps.stale_gradients) == {"zeros"}
    assert not observe(Classifier()).steps.stale_gradients


def test_three_steps_are_traced_and_none_of_them_is_timed() -> None:
    found = observe(Classifier())
    assert len(found.traces) == 3
    # an epoch's last batch is no whole cycle, two warm up, three are traced, and one more with lines of code
    assert len(found.timed) == 2 * 6 - 2 - 4


def test_all_batches_of_an_accumulated_step_are_in_the_trace() -> None:
    one = observe(Classifier()).trace
    three = observe(Classifier(), accumulate_grad_batches=3, batches=12).trace
    assert one is not None
    assert three is not None
    assert three.masks == 3 * one.masks
    assert three.optimizer["aten::_fused_adamw_"] == one.optimizer["aten::_fused_adamw_"] == 1


def test_everything_is_restored_also_after_an_exception() -> None:
    class Failing(Classifier):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if self.trainer.global_step == 11:  # while it is traced
                raise RuntimeError("planted")
            return super().training_step(batch, batch_idx)

    for module in (Classifier(), Failing()):
        observer = StepObserver()
        if isinstance(module, Failing):
            with pytest.raises(RuntimeError, match="planted"):
                fit(module, observer)
            assert len(observer.observation.traces) == 1  # and one with lines of code
        else:
            trainer = fit(module, observer)
            assert "batch_to_device" not in vars(trainer.strategy)
        assert not torch.autograd._profiler_enabled()


def test_seconds_are_medians_over_the_cycles_that_were_not_slowed() -> None:
    slow = Cycle({"[A]x.fetch": 9.0}, 9.0, slowed=True)
    cycles = [Cycle({"[A]x.fetch": float(n)}, 10.0 + n) for n in range(5)]
    found = Observation(cycles=[*cycles, slow])  # the first two warm up
    assert found.seconds("fetch") == 3.0
    assert found.cycle_seconds == 13.0
    assert Observation().cycle_seconds == 0.0


def test_batches_of_several_kinds_are_counted() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    seen = batch_stats({"input_ids": mask, "attention_mask": mask})
    assert (seen.rows, seen.tokens, seen.padded_tokens, seen.width, seen.longest) == (2, 4, 8, 4, 3)
    query = {"attention_mask": torch.ones(2, 3)}
    pairs = batch_stats({"query": query, "passages": [{"attention_mask": mask}], "negative_attention_mask": mask})
    # the query's mask is the fullest: nothing is padded to a fixed width there
    assert (pairs.rows, pairs.tokens, pairs.padded_tokens, pairs.width, pairs.longest) == (2, 14, 22, 3, 3)
    assert batch_stats([torch.zeros(5, 2), torch.zeros(5)]).rows == 5
    assert batch_stats((torch.zeros(3), {"x": torch.zeros(1)})).tokens is None
    table = SimpleNamespace(values=np.zeros(2), items=())  # as a column index of pandas has them
    assert batch_stats({"x": torch.zeros(3, 2), "names": table}).rows == 3
    assert batch_stats("no tensor").rows is None


def test_the_most_frequent_number_of_batches_counts_or_the_larger_of_equals() -> None:
    # fp16 leaves out steps whose gradients overflow
    assert OptimizerSteps(batches=Counter({1: 12, 2: 1})).batches_per_step == 1
    assert OptimizerSteps(batches=Counter({4: 2, 3: 2})).batches_per_step == 4
    assert OptimizerSteps().batches_per_step == 0
    assert Observation().batches_per_step == 1


def test_lines_of_code_are_found_in_the_second_step_that_is_traced() -> None:
    found = observe(Classifier(), accumulate_grad_batches=2, batches=7)
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


def test_gradients_of_another_optimizer_are_no_finding() -> None:
    assert not observe(Adversarial()).steps.stale_gradients


def test_an_empty_trace_has_all_parts() -> None:
    assert sum(StepTrace().parts.values()) == 0
