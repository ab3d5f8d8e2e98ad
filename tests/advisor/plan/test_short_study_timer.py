"""Batches of training and validation, timed with a clock that the test moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from lightning_bge.advisor.plan import short_study
from lightning_bge.advisor.plan.short_study import Step, StepTimer, seconds_of, work_of
from lightning_bge.hpo.trial.text_setup import TextTrialSetup
from tests.helpers.small_search import make, write_files

PARAMS = {"lr": 1e-3, "dropout": 0.1}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Spend(Callback):
    """Moves the clock in each part of a run."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_fit_start(self, *_: Any) -> None:
        self.clock.now += 3  # building

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock.now += 0.5  # the wait

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        self.clock.now += 2 + trainer.global_step  # the step

    def on_validation_batch_start(self, *_: Any) -> None:
        self.clock.now += 0.25

    def on_validation_epoch_end(self, *_: Any) -> None:
        self.clock.now += 7

    def on_train_end(self, *_: Any) -> None:
        self.clock.now += 11


@pytest.fixture
def setup(tmp_path: Path) -> TextTrialSetup:
    return make(write_files(tmp_path)).build(PARAMS)


def timed(setup: TextTrialSetup, *callbacks: Callback, **limits: Any) -> StepTimer:
    timer = StepTimer(lambda batch: batch.tokens)
    trainer = setup.make_trainer(callbacks=[*callbacks, timer], max_epochs=1, **limits)
    timer.start()
    trainer.fit(setup.model, datamodule=setup.datamodule)
    return timer


def test_each_part_of_a_run_gets_its_seconds(setup: TextTrialSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(short_study, "_clock", clock)
    setup.datamodule.select_fold(0)
    found = timed(setup, Spend(clock), limit_train_batches=3, limit_val_batches=1)
    # the wait for the first batch is a part of the time before it
    assert (found.began, found.ready, found.first) == (100, 103, 103.5)
    assert [(step.seconds, step.wait) for step in found.steps] == [(2, 0), (3, 0.5), (4, 0.5)]
    assert [(step.seconds, step.wait) for step in found.validation] == [(0, 0)]
    assert (found.validations, found.last, found.ended) == (1, 113.5 + 7.25, 113.5 + 7.25 + 11)
    found.start()
    assert (found.began, found.steps, found.validations, found.ready) == (found.last, [], 0, None)


def test_tokens_are_those_of_the_batches(setup: TextTrialSetup) -> None:
    data = setup.datamodule
    data.select_fold(1)
    data.set_micro_batch_size(24)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0)
    batches, validation = list(loader), list(data.val_dataloader())
    found = timed(setup)
    assert [step.work for step in found.steps] == [batch.tokens for batch in batches]  # 20 rows in batches of 8
    assert work_of(found.validation) == sum(batch.tokens for batch in validation)
    assert min(step.seconds for step in (*found.steps, *found.validation)) > 0


def test_seconds_and_tokens_add_up_with_the_waits() -> None:
    steps = (Step(1.0, 0.0, 100), Step(2.0, 1.0, 300))
    assert (seconds_of(steps), work_of(steps)) == (4.0, 400)
