"""The parts of a short run, measured with a clock that the test moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from lightning_bge.advisor.plan import pace as measure
from lightning_bge.advisor.plan.pace import Pace, Step, measure_pace
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.trial.objective import TrialSetup
from tests.helpers.small_search import make, write_files

PARAMETER_SET = {"lr": 1e-3, "dropout": 0.1}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Spend(Callback):
    """Moves the clock on where each part of a run happens."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_fit_start(self, *_: Any) -> None:
        self.clock.now += 3  # the start

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
def setup(tmp_path: Path) -> TrialSetup:
    return make(write_files(tmp_path)).build(PARAMETER_SET)


def test_each_part_of_a_run_gets_its_seconds(setup: TrialSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(measure, "_clock", clock)
    load = setup.model.load

    def slow(*args: Any, **options: Any) -> Any:
        clock.now += 13
        return load(*args, **options)

    setup.model.load_encoder_with(slow)
    setup.datamodule.select_fold(0)
    found = measure_pace(setup, steps=2, warmup=1, val_batches=1, callbacks=[Spend(clock)])
    assert (found.build, found.start, found.end) == (13, 3.5, 11)  # the first wait is a part of the start
    assert [(step.seconds, step.wait) for step in (*found.warmup, *found.steps)] == [(2, 0), (3, 0.5), (4, 0.5)]
    assert [(step.seconds, step.wait) for step in found.validation] == [(0, 0)]
    assert found.validation_rest == 7.25
    assert (found.seconds, found.step_seconds) == (8, 4)
    assert found.tokens_per_s == found.tokens / 8


def test_tokens_sequences_and_micro_batches_are_those_of_the_batches(setup: TrialSetup) -> None:
    data = setup.datamodule
    data.select_fold(1)
    data.set_micro_batch_size(24)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0)
    batches = list(loader)
    tested = list(data.val_dataloader())
    found = measure_pace(setup, steps=10, warmup=0, val_batches=len(tested))
    assert [(s.sequences, s.tokens, s.micro_batches) for s in found.steps] == [
        (batch.size, batch.tokens, len(batch.micro))
        for batch in batches  # 20 rows in batches of 8: all three
    ]
    assert sum(step.tokens for step in found.validation) == sum(batch.tokens for batch in tested)
    assert min(step.seconds for step in (*found.steps, *found.validation)) > 0
    assert min(found.build, found.start, found.end, found.validation_rest) > 0
    assert setup.model.net is None  # a warm encoder may have it again


def test_without_validation_nothing_is_validated(setup: TrialSetup) -> None:
    setup.datamodule.select_fold(0)
    found = measure_pace(setup, steps=1)
    assert (len(found.warmup), len(found.steps), found.validation, found.validation_rest) == (1, 1, (), 0.0)


def test_an_epoch_must_have_a_step_besides_the_warm_up(setup: TrialSetup) -> None:
    setup.datamodule.select_fold(0)
    with pytest.raises(ConfigError, match="an epoch has 3 optimizer steps, 3 of them to warm up"):
        measure_pace(setup, steps=5, warmup=3)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 1, "warmup": -1}, {"steps": 1, "val_batches": -1}])
def test_wrong_numbers_are_refused(setup: TrialSetup, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected steps >= 1"):
        measure_pace(setup, **wrong)


def test_a_pace_adds_up() -> None:
    steps = (Step(1.0, 0.0, 8, 100, 1), Step(2.0, 1.0, 8, 300, 2))
    pace = Pace((), steps, 0.0, 0.0, 0.0, (), 0.0)
    assert (pace.tokens, pace.seconds, pace.step_seconds, pace.tokens_per_s) == (400, 4.0, 2.0, 100.0)
