"""A calibration with trials whose parts take known seconds, by a clock that only the test moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from lightning_bge.advisor.plan import calibrate as calibrate_module
from lightning_bge.advisor.plan import short_study
from lightning_bge.advisor.plan.calibrate import TimedTrial, calibrate
from lightning_bge.advisor.plan.cost_model import ParameterSets
from lightning_bge.advisor.plan.planned_trials import DataSize
from lightning_bge.advisor.plan.short_study import ShortStudy, Step, TimedRun
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.scheduling.trial_loop import quiet_optuna
from lightning_bge.hpo.space.draw import SamplerConfig
from lightning_bge.hpo.space.parameter_sets import draw_parameter_sets
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.trial.text_setup import TextBuild, TextTrialSetup
from lightning_bge.models.encoder_cache import EncoderCache
from tests.helpers.planned_texts import PlannedTexts
from tests.helpers.small_search import SPACE, make, write_files

quiet_optuna()
BUILD, START, STEP, FIRST, VALIDATION, EPOCH, END = 1.0, 2.0, 0.01, 5.0, 0.001, 3.0, 4.0
READ, RESET = 30.0, 0.5
PARAMS = {"lr": 1e-3, "dropout": 0.1}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Spend(Callback):
    """Moves the clock: so many seconds for each token in training and validation, and for the other parts."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.fresh = clock, True

    def on_fit_start(self, *_: Any) -> None:
        self.fresh = True

    def on_train_start(self, *_: Any) -> None:
        self.clock.now += START

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.clock.now += STEP * batch.tokens + FIRST * self.fresh
        self.fresh = False

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.clock.now += VALIDATION * batch.tokens

    def on_validation_epoch_end(self, *_: Any) -> None:
        self.clock.now += EPOCH

    def on_fit_end(self, *_: Any) -> None:
        self.clock.now += END


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for module in (short_study, calibrate_module):
        monkeypatch.setattr(module, "_clock", found)
    return found


class SlowToRead(EncoderCache):
    """Loads by the clock of the test alone."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def load(self, *args: Any, **options: Any) -> Any:
        loads, load_seconds = self.loads, self.load_seconds
        net = super().load(*args, **options)
        seconds = RESET + READ * (self.loads > loads)
        self.clock.now += seconds
        self.load_seconds = load_seconds + seconds
        return net


def slow_build(tmp_path: Path, clock: Clock, batch_size: int = 4) -> TextBuild:
    """20 rows in each fold: five steps with batches of 4."""
    build = make(write_files(tmp_path), (Spend(clock),)).build

    def slow(params: dict[str, Any]) -> TextTrialSetup:
        clock.now += BUILD
        setup = build(params)
        setup.datamodule.batch_size = batch_size
        return setup

    return slow


def study_of(tmp_path: Path, clock: Clock, build: TextBuild, pruner: str = "asha") -> ShortStudy:
    hpo = StudyConfig(12, SPACE, pruner=PrunerConfig(pruner), sampler=SamplerConfig("random"))  # type: ignore[arg-type]
    folder = tmp_path / "calibration"
    folder.mkdir()
    return ShortStudy(PlannedTexts(build, SlowToRead(clock)), hpo, folder)


@pytest.mark.parametrize("pruner", ["asha", "none"])
def test_each_part_is_scaled_to_its_full_size(tmp_path: Path, clock: Clock, pruner: str) -> None:
    build = slow_build(tmp_path, clock)
    study, space = study_of(tmp_path, clock, build, pruner), parse_space(SPACE)
    size = DataSize.of(build(PARAMS).datamodule)
    clock.now = 0.0
    found = calibrate(study, ParameterSets(space, draw_parameter_sets(space, [], 20), epochs=2), 1000.0, 2)
    assert len(found.trials) >= 2
    for trial in found.trials:
        cost = trial.cost
        assert cost.train == pytest.approx(STEP * size.train)
        assert cost.validation == pytest.approx(VALIDATION * size.validation)
        assert cost.epoch == pytest.approx(EPOCH)
        assert cost.fold == pytest.approx(BUILD + RESET + START + FIRST + END)
        assert (cost.start, cost.resume, cost.epochs) == (0.0, 0.0, 2)
        assert trial.error == pytest.approx(0.0, abs=1e-9)
    # the encoder is read once a study, and a second time for the refit, which is a part of its end
    assert found.first_trial == pytest.approx(READ)
    assert found.read == pytest.approx(READ)
    assert found.refit_epoch == pytest.approx(STEP * size.all)
    assert found.steps == size.steps == 5
    # two builds at the end, and one fold, whose encoder is read without the cache
    assert found.end == pytest.approx(2 * BUILD + START + FIRST + END, abs=1e-6)


def test_sizes_are_means_over_the_folds(tmp_path: Path, clock: Clock) -> None:
    data = slow_build(tmp_path, clock)(PARAMS).datamodule
    lengths = data.lengths("train")
    assert DataSize.of(data) == DataSize(lengths.sum() / 2, lengths.sum() / 2, lengths.sum(), 5)


def test_a_measurement_ends_after_its_seconds(tmp_path: Path, clock: Clock) -> None:
    study, space = study_of(tmp_path, clock, slow_build(tmp_path, clock)), parse_space(SPACE)
    found = calibrate(study, ParameterSets(space, draw_parameter_sets(space, [], 20), epochs=2), 1.0, 2)
    assert len(found.trials) == 1  # the first one is measured in any case


class Fails(Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise MemoryError("can't allocate memory")


def failing(build: TextBuild, rates: tuple[float, ...]) -> TextBuild:
    """Trials with these rates of dropout run out of memory."""

    def some(params: dict[str, Any]) -> TextTrialSetup:
        setup = build(params)
        if params["dropout"] not in rates:
            return setup
        inner = setup.make_trainer
        return replace(setup, make_trainer=lambda callbacks, **more: inner(callbacks=[*callbacks, Fails()], **more))

    return some


def test_trials_that_run_out_of_memory_are_counted(tmp_path: Path, clock: Clock) -> None:
    study = study_of(tmp_path, clock, failing(slow_build(tmp_path, clock), (0.0,)))
    parameter_sets = [{"lr": 1e-3, "dropout": rate} for rate in (0.0, 0.1, 0.3)]
    found = calibrate(study, ParameterSets(parse_space(SPACE), parameter_sets, 2), 1000.0, 2)
    assert (len(found.trials), found.out_of_memory) == (2, 1)


def test_without_any_trial_that_fits_into_memory_there_is_no_plan(tmp_path: Path, clock: Clock) -> None:
    study = study_of(tmp_path, clock, failing(slow_build(tmp_path, clock), (0.1,)))
    with pytest.raises(ConfigError, match="all 1 parameter sets that were tried ran out of memory"):
        calibrate(study, ParameterSets(parse_space(SPACE), [PARAMS], 2), 1000.0, 2)


def test_an_epoch_of_one_step_can_be_measured(tmp_path: Path, clock: Clock) -> None:
    build = slow_build(tmp_path, clock, batch_size=100)
    found = calibrate(study_of(tmp_path, clock, build), ParameterSets(parse_space(SPACE), [PARAMS], 2), 1000.0, 2)
    assert found.steps == 1
    assert found.trials[0].cost.train == pytest.approx(STEP * DataSize.of(build(PARAMS).datamodule).train)


def run(*seconds: float) -> TimedRun:
    """Of steps of 10 tokens each, the first one a second longer."""
    steps = tuple(Step(s + (number == 0), 0.0, 10) for number, s in enumerate(seconds))
    return TimedRun(10.0, 0.0, False, 0.0, 0.0, 5.0, 0.0, steps, (Step(1.0, 0.0, 10),), 1)


def test_the_excess_of_batches_that_are_new_to_the_process_counts_once() -> None:
    """A trial trains 2 folds x 3 epochs of 100 tokens; its steps take 3 s, and 2 s once their batches are known."""
    size = DataSize(100.0, 50.0, 150.0, 10)
    trial = TimedTrial({}, size, (run(3.0, 3.0, 3.0),), (run(2.0, 2.0, 2.0),), folds=2)
    assert trial.rate == pytest.approx(0.2)
    assert trial.new_batches(epochs=3) == pytest.approx(0.1 * 100 * 3 * 2)
    assert TimedTrial({}, size, trial.first).rate == pytest.approx(0.3)
    assert TimedTrial({}, size, trial.first).new_batches(epochs=3) == 0
